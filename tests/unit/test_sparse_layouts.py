"""Layouts of blocks: against the loops that DeepSpeed's own classes are written as, and what is refused."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from twofold.core import CheckpointError, ConfigError
from twofold.core import sparse as module
from twofold.core.sparse import (
    BigBird,
    Fixed,
    Layout,
    Local,
    Longformer,
    Strided,
    Variable,
    density,
    picture,
    sparse_attention,
)
from twofold.models import spec_from

PICTURED = {
    "local": Local(),
    "strided": Strided(stride_blocks=3),
    "fixed": Fixed(),
    "variable": Variable(local_window_blocks=(2, 3)),
    "bigbird": BigBird(seed=1),
    "longformer": Longformer(),
}
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
}
N = 23


def window(i: int, j: int, blocks: int) -> bool:
    return abs(i - j) <= blocks // 2


def fixed(i: int, j: int, its: Fixed, pattern: int) -> bool:
    """FixedSparsityConfig: set_local_layout and set_global_layout, looking back only."""
    size, shared = its.num_local_blocks, its.num_global_blocks
    first = size - (1 + pattern) * shared
    summary = {k for start in range(0, N + size, size) for k in range(start + first, start + first + shared)}
    return i // size == j // size or j in summary or (its.horizontal_global_attention and i in summary)


def variable(i: int, j: int, its: Variable) -> bool:
    """VariableSparsityConfig without random blocks."""
    windows, start, sizes = [], 0, list(its.local_window_blocks)
    while start < N:
        size = sizes.pop(0) if sizes else its.local_window_blocks[-1]
        windows.append(range(start, start + size))
        start += size
    everyone = set(its.global_block_indices)
    if its.global_block_end_indices:
        pairs = zip(its.global_block_indices, its.global_block_end_indices)
        everyone = {k for first, end in pairs for k in range(first, end)}
    mine = next(each for each in windows if i in each)
    return j in mine or j in everyone or (its.horizontal_global_attention and i in everyone)


def longformer(i: int, j: int, its: Longformer) -> bool:
    ends = its.global_block_end_indices or [index + 1 for index in its.global_block_indices]
    everyone = {k for first, end in zip(its.global_block_indices, ends) for k in range(first, end)}
    return window(i, j, its.num_sliding_window_blocks) or i in everyone or j in everyone


def as_written(layout: Layout, pattern: int) -> str:
    """A layout's picture by loops over all pairs of blocks."""

    def sees(i: int, j: int) -> bool:
        match layout:
            case Local():
                return window(i, j, layout.num_sliding_window_blocks)
            case Strided():
                return i - j < layout.stride_blocks or (i - j) % layout.stride_blocks == 0
            case Fixed():
                return fixed(i, j, layout, pattern)
            case Variable():
                return variable(i, j, layout)
            case BigBird():
                return window(i, j, layout.num_sliding_window_blocks) or j < layout.num_global_blocks
            case Longformer():
                return longformer(i, j, layout)
        raise AssertionError(layout)

    return "\n".join("".join(".#"[j <= i and sees(i, j)] for j in range(N)) for i in range(N))


@pytest.mark.parametrize(
    "layout",
    [
        *(Local(num_sliding_window_blocks=n) for n in (1, 2, 3, 8)),
        *(Strided(stride_blocks=n) for n in (1, 2, 5, 40)),
        Fixed(),
        Fixed(num_local_blocks=6, num_global_blocks=2, horizontal_global_attention=True),
        Fixed(num_local_blocks=4, num_different_global_patterns=3, different_layout_per_head=True),
        Fixed(num_local_blocks=1),
        Variable(),
        Variable(local_window_blocks=(1, 5, 3), global_block_indices=(2, 9), horizontal_global_attention=True),
        Variable(global_block_indices=(0, 7), global_block_end_indices=(2, 10)),
        Variable(global_block_indices=()),
        BigBird(num_random_blocks=0, num_sliding_window_blocks=5, num_global_blocks=2),
        Longformer(global_block_indices=(0, 4), num_sliding_window_blocks=2),
        Longformer(global_block_indices=(3,), global_block_end_indices=(6,)),
    ],
    ids=str,
)
def test_rows_are_those_of_the_loops(layout: Layout) -> None:
    for head in range(4):
        pattern = layout.pattern(head)
        assert picture(layout, N, pattern) == as_written(layout, pattern)


@pytest.mark.parametrize("layout", [*PICTURED.values(), Variable(num_random_blocks=3), BigBird(num_random_blocks=40)])
def test_a_query_sees_its_own_block_and_none_to_come(layout: Layout) -> None:
    for i in (*range(20), 1000):
        row = layout.row(layout.pattern(3), i)
        assert row >> i == 1


def test_random_blocks_are_different_ones_of_the_past_and_a_matter_of_seed_head_and_row() -> None:
    layout = BigBird(
        num_random_blocks=3, num_sliding_window_blocks=1, num_global_blocks=0, different_layout_per_head=True
    )
    rows = {(head, i): layout.row(layout.pattern(head), i) for head in range(4) for i in range(200)}
    drawn = [row.bit_count() for (_, i), row in rows.items() if i >= 3]
    assert set(drawn) == {3, 4}, "its own block may be among the three"
    assert len({rows[head, 150] for head in range(4)}) == 4
    assert rows[0, 150] != replace(layout, seed=1).row(0, 150)
    alike = replace(layout, different_layout_per_head=False)
    assert {alike.pattern(head) for head in range(4)} == {0}
    hits = [sum(rows[head, i] >> j & 1 for head in range(4) for i in range(100, 200)) for j in range(100)]
    assert min(hits) > 0 and max(hits) < 40, "no block is forgotten, none a favourite"


def test_pictures_in_the_text_are_those_of_the_code() -> None:
    lines = (module.__doc__ or "").splitlines()
    at = next(number for number, line in enumerate(lines) if line.split() == list(PICTURED))
    columns = list(zip(*(line.split() for line in lines[at + 1 : at + 9])))
    for column, layout in zip(columns, PICTURED.values(), strict=True):
        assert "\n".join(column) == picture(layout)


def test_density_falls_with_length() -> None:
    assert density(Fixed(num_local_blocks=8), 8) == 1.0
    found = [density(BigBird(), blocks) for blocks in (8, 64, 512)]
    assert found[0] > 3 * found[1] > 9 * found[2]


def test_a_table_names_the_mode_its_keys_and_the_layers() -> None:
    table = {"mode": "fixed", "block": 32, "num_local_blocks": 8, "layers": "odd", "attention": "unidirectional"}
    found = sparse_attention(table, 4)
    assert [found.at(i) for i in range(4)] == [None, Fixed(block=32, num_local_blocks=8)] * 2
    some = sparse_attention({"mode": "bslongformer", "global_block_indices": [0, 5], "layers": [0, 3]}, 4)
    assert [some.at(i) is not None for i in range(4)] == [True, False, False, True]
    assert sparse_attention({"mode": "dense"}, 4).at(0) is None
    assert sparse_attention({"mode": "local", "layers": "even"}, 2).at(0) == Local()


@pytest.mark.parametrize(
    ("table", "says"),
    [
        ({"mode": "fixd"}, "did you mean 'fixed'"),
        ({}, "unknown layout 'None'"),
        ({"mode": "fixed", "num_local_block": 4}, "did you mean 'sparse_attention.num_local_blocks'"),
        ({"mode": "bigbird", "num_local_blocks": 4}, "unknown key"),
        ({"mode": "local", "block": 24}, "multiple of 16"),
        ({"mode": "local", "block": "wide"}, "whole number|integer|int"),
        ({"mode": "fixed", "num_global_blocks": 3}, "must be a multiple of num_global_blocks"),
        ({"mode": "fixed", "num_different_global_patterns": 2}, "needs different_layout_per_head"),
        ({"mode": "fixed", "num_different_global_patterns": 5, "different_layout_per_head": True}, "4 places"),
        ({"mode": "strided", "stride_blocks": 0}, "at least 1"),
        ({"mode": "variable", "local_window_blocks": []}, "is empty"),
        ({"mode": "variable", "local_window_blocks": [2, 0]}, "at least 1"),
        ({"mode": "longformer", "global_block_indices": [-1]}, "0 or more"),
        ({"mode": "longformer", "global_block_indices": [3], "global_block_end_indices": [3]}, "an end above each"),
        ({"mode": "fixed", "attention": "bidirectional"}, "looks back only"),
        ({"mode": "local", "layers": "some"}, "all, odd, even"),
        ({"mode": "local", "layers": [4]}, "none of the layers 0 to 3"),
        ({"mode": "local", "layers": [True]}, "none of the layers"),
    ],
)
def test_what_cannot_be_is_refused(table: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        sparse_attention(table, 4)
    with pytest.raises(CheckpointError, match=says):
        spec_from(LLAMA | {"sparse_attention": table})


def test_config_json_says_which_layers_are_sparse() -> None:
    told = {"mode": "local", "block": 64, "num_sliding_window_blocks": 5, "layers": "odd"}
    layers = spec_from(LLAMA | {"sparse_attention": told}).layers
    assert [layer.mixer.sparse for layer in layers] == [None, Local(block=64, num_sliding_window_blocks=5)] * 2
    assert spec_from(LLAMA).layers[1].mixer.sparse is None
    assert re.search(r"sparse=Local\(block=64", repr(layers[1])), "printing a spec shows it"
