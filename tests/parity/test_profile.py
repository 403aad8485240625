"""A profile's parts are the whole: FLOPs those of a count, time the step's, bytes those alive, weights the model's."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from test_recompute import LENGTHS, fresh, gradients, held, spec_of

from twofold.kernels.flops import count
from twofold.train.profile import TIMED, WARM, Profile, around
from twofold.train.profile_tree import Node, grouped, table
from twofold.train.recompute import recompute_layers

STEPS = WARM + 1 + TIMED


def profiled(folder: Path, policy: str = "none", family: str = "llama") -> tuple[Node, list[str], float]:
    """The tree, what was said, and seconds of the timed steps, each."""
    decoder, said = fresh(spec_of(family)), list[str]()
    recompute_layers(decoder, policy)
    profile = Profile(decoder, folder, said.append)
    seconds = 0.0
    for number in range(STEPS + 1):
        start = time.perf_counter()
        with profile():
            gradients(decoder)
        seconds += time.perf_counter() - start if WARM < number < STEPS else 0.0
    return profile.tree(), said, seconds / TIMED


@pytest.mark.parametrize("policy", ["none", "selective", "full", "attention"])
def test_the_parts_are_the_whole(tmp_path: Path, policy: str) -> None:
    tree, said, seconds = profiled(tmp_path, policy)
    total, decoder = tree.total(), fresh(spec_of("llama"))
    recompute_layers(decoder, policy)
    with count() as counted:
        gradients(decoder)
    found = {phase: total.flops[phase] for phase in ("forward", "backward", "again")}
    assert found == {"forward": counted.forward, "backward": counted.backward, "again": counted.again}
    assert total.parameters == sum(p.numel() for p in decoder.parameters())
    assert total.held == held(policy, spec_of("llama"), LENGTHS)
    times = total.seconds
    assert 0.5 * seconds < sum(times.values()) < 1.5 * seconds
    assert times["forward"] > 0 and times["backward"] > 0 and bool(times["again"]) == (policy != "none")
    record = json.loads((tmp_path / "profile.json").read_text())
    assert record["tree"]["parameters"] == total.parameters and record["tree"]["children"][0]["name"] == "decoder"
    assert len(said) == 2 and said[1].startswith(" ")


def test_each_part_is_where_it_belongs(tmp_path: Path) -> None:
    tree, _, _ = profiled(tmp_path, "full", "qwen2-moe")
    spec, T = spec_of("qwen2-moe"), sum(LENGTHS)
    mixer, D = spec.layers[0].mixer, spec.hidden
    qkv = tree.at("decoder.layers.1.qkv")
    product = 2 * T * D * (mixer.q_width + 2 * mixer.kv_width)
    assert {phase: n for phase, n in qkv.flops.items() if n} == {
        "forward": product,
        "backward": 2 * product,
        "again": product,
    }
    assert qkv.parameters == (D + 1) * (mixer.q_width + 2 * mixer.kv_width)
    layer = tree.at("decoder.layers.1")
    assert {"norm1", "qkv", "rotate", "packed_attention", "out", "norm2", "router", "route", "experts"} <= set(
        layer.children
    )
    assert {"experts", "gate_up", "down"} <= set(layer.children["experts"].children)
    assert layer.children["packed_attention"].flops["again"] == layer.children["packed_attention"].flops["forward"] > 0
    assert tree.at("token_logprobs").flops["again"] == 0 < tree.at("token_logprobs").flops["backward"]
    assert not tree.at("decoder.layers.0.rotate.down").seconds


def test_layers_alike_are_one_row() -> None:
    root = Node("")
    for i in range(5):
        root.at(f"decoder.layers.{i}.qkv").flops["forward"] = 10**9
    root.at("decoder.norm").seconds["forward"] = 1.0
    kinds = {f"decoder.layers.{i}": "window" if i == 3 else "global" for i in range(5)}
    rows = table(grouped(root, kinds)).splitlines()
    names = [row[:30].rstrip() for row in rows[1:]]
    assert names[0].startswith("step") and len(rows) == 8
    assert any("layers 0-2,4 (4)" in row and "4.000" in row for row in rows)
    assert any("layers.3" in row and "1.000" in row for row in rows)
    assert any("norm" in row and "100.0%" in row for row in rows)
    assert root.total().flops["forward"] == 5 * 10**9


def test_nothing_goes_around_a_step_when_nothing_is_asked(tmp_path: Path) -> None:
    said: list[str] = []
    decoder = fresh(spec_of("llama"))
    step = around(["collectives"], decoder, tmp_path, said.append)
    for _ in range(6):
        with step():
            pass
    assert said[-1] == "none: this run is one process"
    assert json.loads((tmp_path / "comm.json").read_text()) == {"steps": 3, "collectives": []}
    said.clear()
    with around([], decoder, tmp_path, said.append)():
        pass
    assert not said
