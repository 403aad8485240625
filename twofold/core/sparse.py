"""Block-sparse attention as data: which blocks of keys a block of queries sees, by DeepSpeed's names.

Query block i sees key block j where there is a mark; every layout looks back only, and at its own block always:

    local           strided         fixed           variable        bigbird         longformer
    #.......        #.......        #.......        #.......        #.......        #.......
    ##......        ##......        ##......        ##......        ##......        ##......
    .##.....        ###.....        ###.....        #.#.....        ###.....        ###.....
    ..##....        ####....        ####....        #.##....        #.##....        #.##....
    ...##...        .####...        ...##...        #.###...        #.###...        #..##...
    ....##..        ..####..        ...###..        #....#..        #..###..        #...##..
    .....##.        #..####.        ...####.        #....##.        ##...##.        #....##.
    ......##        .#..####        ...#####        #....###        #.....##        #.....##

A row depends on the head and on i alone, never on the sequence's length, so a token sees the same keys in training, in
a chunk of its prompt and in decoding; random blocks are a hash of (seed, head, i). A sequence may end inside a block.
Masks inside a block are the usual ones: causal, and a window where the model has one.

Sparse Transformer: Child et al. 2019 (strided, fixed). Longformer: Beltagy et al. 2020. BigBird: Zaheer et al. 2020.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from .config import build
from .errors import ConfigError, unknown

PANEL = 16  # keys that the kernels take or leave together


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """What every layout has: `block` tokens a block, and whether heads differ from each other."""

    block: int = 16
    """Tokens of a block: a multiple of 16."""
    different_layout_per_head: bool = False
    """Whether each head has its own pattern, where the kind of layout has more than one."""

    def __post_init__(self) -> None:
        if self.block < PANEL or self.block % PANEL:
            raise ConfigError(f"sparse_attention.block is {self.block}: choose a multiple of {PANEL}, such as 64")

    def pattern(self, head: int) -> int:
        """The number of a head's pattern: heads of one number see the same blocks."""
        return 0

    def row(self, pattern: int, i: int) -> int:
        """The key blocks that query block i sees: bit j stands for block j, of which none is above i."""
        return (self._seen(pattern, i) | 1 << i) & _below(i + 1)

    def _seen(self, pattern: int, i: int) -> int:
        """The same; bits above i do not matter."""
        raise AssertionError("each kind of layout has its own")


@dataclass(frozen=True, kw_only=True, slots=True)
class Local(Layout):
    """A window that slides block by block."""

    num_sliding_window_blocks: int = 3
    """Blocks of the window, as if it looked both ways: 3 is one to the left, one's own, and one ahead, never seen."""

    def __post_init__(self) -> None:
        Layout.__post_init__(self)
        _at_least(1, num_sliding_window_blocks=self.num_sliding_window_blocks)

    def _seen(self, pattern: int, i: int) -> int:
        return _window(i, self.num_sliding_window_blocks)


@dataclass(frozen=True, kw_only=True, slots=True)
class Strided(Layout):
    """The last `stride_blocks` blocks, and of those before every `stride_blocks`-th, counted from the query's own."""

    stride_blocks: int = 4

    def __post_init__(self) -> None:
        Layout.__post_init__(self)
        _at_least(1, stride_blocks=self.stride_blocks)

    def _seen(self, pattern: int, i: int) -> int:
        stride = self.stride_blocks
        return _from(i - stride + 1) | _comb(stride, i // stride + 1) << i % stride


@dataclass(frozen=True, kw_only=True, slots=True)
class Fixed(Layout):
    """Windows that lie side by side; the last blocks of each are summaries that all later queries see."""

    num_local_blocks: int = 4
    """Blocks of a window."""
    num_global_blocks: int = 1
    """Blocks of each window that later windows see."""
    num_different_global_patterns: int = 1
    """How many places in a window heads take their global blocks from: the last, the one before, and so on."""
    horizontal_global_attention: bool = False
    """Whether the queries of global blocks see everything before them."""

    def __post_init__(self) -> None:
        Layout.__post_init__(self)
        local, shared, patterns = self.num_local_blocks, self.num_global_blocks, self.num_different_global_patterns
        _at_least(1, num_local_blocks=local, num_global_blocks=shared, num_different_global_patterns=patterns)
        if local % shared:
            raise ConfigError(
                f"sparse_attention: num_local_blocks ({local}) must be a multiple of num_global_blocks ({shared})"
            )
        if patterns > local // shared:
            raise ConfigError(
                f"sparse_attention: a window of {local} blocks has {local // shared} places for {shared} global ones, "
                f"not num_different_global_patterns = {patterns}"
            )
        if patterns > 1 and not self.different_layout_per_head:
            raise ConfigError("sparse_attention: num_different_global_patterns needs different_layout_per_head = true")

    def pattern(self, head: int) -> int:
        return head % self.num_different_global_patterns

    def _seen(self, pattern: int, i: int) -> int:
        local, shared = self.num_local_blocks, self.num_global_blocks
        first = local - (1 + pattern) * shared
        if self.horizontal_global_attention and first <= i % local < first + shared:
            return _from(0)
        return _from(i - i % local) | _comb(local, i // local + 1) * _below(shared) << first


@dataclass(frozen=True, kw_only=True, slots=True)
class Variable(Layout):
    """Windows of given sizes side by side, blocks that everyone sees, and random ones."""

    num_random_blocks: int = 0
    """Blocks that each query block draws from those up to its own."""
    local_window_blocks: tuple[int, ...] = (4,)
    """Blocks of the first window, the second and so on; the last size goes on."""
    global_block_indices: tuple[int, ...] = (0,)
    """Blocks that every later query sees."""
    global_block_end_indices: tuple[int, ...] | None = None
    """With these, each global index begins a range that ends before its end index."""
    horizontal_global_attention: bool = False
    """Whether the queries of global blocks see everything before them."""
    seed: int = 0
    """Of the random blocks."""

    def __post_init__(self) -> None:
        Layout.__post_init__(self)
        _at_least(0, num_random_blocks=self.num_random_blocks)
        if not self.local_window_blocks:
            raise ConfigError("sparse_attention.local_window_blocks is empty: give at least one window's size")
        _at_least(1, local_window_blocks=min(self.local_window_blocks))
        _check_globals(self.global_block_indices, self.global_block_end_indices)

    def pattern(self, head: int) -> int:
        return head if self.different_layout_per_head and self.num_random_blocks else 0

    def _seen(self, pattern: int, i: int) -> int:
        everyone = _global(self.global_block_indices, self.global_block_end_indices)
        if self.horizontal_global_attention and everyone >> i & 1:
            return _from(0)
        return _from(self._window_of(i)) | everyone | _random(self.num_random_blocks, self.seed, pattern, i)

    def _window_of(self, i: int) -> int:
        """The first block of the window that block i lies in."""
        start = 0
        for size in self.local_window_blocks:
            if i < start + size:
                return start
            start += size
        return i - (i - start) % self.local_window_blocks[-1]


@dataclass(frozen=True, kw_only=True, slots=True)
class BigBird(Layout):
    """A sliding window, the first blocks for everyone, and random ones."""

    num_random_blocks: int = 1
    """Blocks that each query block draws from those up to its own."""
    num_sliding_window_blocks: int = 3
    """Blocks of the window, as if it looked both ways."""
    num_global_blocks: int = 1
    """How many of the first blocks every query sees."""
    seed: int = 0
    """Of the random blocks."""

    def __post_init__(self) -> None:
        Layout.__post_init__(self)
        _at_least(0, num_random_blocks=self.num_random_blocks, num_global_blocks=self.num_global_blocks)
        _at_least(1, num_sliding_window_blocks=self.num_sliding_window_blocks)

    def pattern(self, head: int) -> int:
        return head if self.different_layout_per_head and self.num_random_blocks else 0

    def _seen(self, pattern: int, i: int) -> int:
        drawn = _random(self.num_random_blocks, self.seed, pattern, i)
        return _window(i, self.num_sliding_window_blocks) | _below(self.num_global_blocks) | drawn


@dataclass(frozen=True, kw_only=True, slots=True)
class Longformer(Layout):
    """A sliding window, and chosen blocks that everyone sees and that see everyone before them."""

    num_sliding_window_blocks: int = 3
    """Blocks of the window, as if it looked both ways."""
    global_block_indices: tuple[int, ...] = (0,)
    """The chosen blocks."""
    global_block_end_indices: tuple[int, ...] | None = None
    """With these, each global index begins a range that ends before its end index."""

    def __post_init__(self) -> None:
        Layout.__post_init__(self)
        _at_least(1, num_sliding_window_blocks=self.num_sliding_window_blocks)
        _check_globals(self.global_block_indices, self.global_block_end_indices)

    def _seen(self, pattern: int, i: int) -> int:
        everyone = _global(self.global_block_indices, self.global_block_end_indices)
        return _from(0) if everyone >> i & 1 else _window(i, self.num_sliding_window_blocks) | everyone


MODES: dict[str, type[Layout]] = {
    "local": Local,
    "strided": Strided,
    "fixed": Fixed,
    "variable": Variable,
    "bigbird": BigBird,
    "longformer": Longformer,
    "bslongformer": Longformer,
}
"""The layouts by the name that a recipe, a config.json or a ds_config gives them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SparseAttention:
    """A layout and the layers that have it; the others are dense."""

    layout: Layout | None
    layers: Literal["all", "odd", "even"] | tuple[int, ...] = "all"

    def at(self, layer: int) -> Layout | None:
        """The layout of a layer, counted from 0."""
        odd_or_even = ("even", "odd")[layer % 2]
        chosen = self.layers in ("all", odd_or_even) if isinstance(self.layers, str) else layer in self.layers
        return self.layout if chosen else None


def sparse_attention(table: Mapping[str, Any], depth: int) -> SparseAttention:
    """The table `sparse_attention` of a recipe, a config.json or a ds_config, for a model of `depth` layers.

    Its keys are `mode`, `layers` ("all", "odd", "even" or a list of numbers from 0) and those of the mode's layout.

    Raises:
        ConfigError: no such mode, a key or a value that the mode does not have, or a layer that the model has not.
    """
    settings = dict(table)
    mode, layers = settings.pop("mode", None), settings.pop("layers", "all")
    if mode not in (*MODES, "dense"):
        raise ConfigError("sparse_attention.mode: " + unknown("layout", str(mode), [*MODES, "dense"]))
    if settings.pop("attention", "unidirectional") != "unidirectional":
        raise ConfigError("sparse_attention.attention: a decoder looks back only; leave it out, or say unidirectional")
    if isinstance(layers, list | tuple):
        layers = tuple(layers)
        strange = [layer for layer in layers if not (type(layer) is int and 0 <= layer < depth)]
        if strange:
            raise ConfigError(f"sparse_attention.layers: {strange[0]!r} is none of the layers 0 to {depth - 1}")
    elif layers not in ("all", "odd", "even"):
        raise ConfigError(f"sparse_attention.layers is {layers!r}: say all, odd, even, or list numbers from 0")
    kind = MODES.get(str(mode), Layout)
    layout = build(kind, settings, "sparse_attention.")
    return SparseAttention(layout=None if mode == "dense" else layout, layers=layers)


def density(layout: Layout, blocks: int, pattern: int = 0) -> float:
    """The share of the causal blocks of so many blocks that a layout has."""
    return sum(layout.row(pattern, i).bit_count() for i in range(blocks)) / (blocks * (blocks + 1) / 2)


def picture(layout: Layout, blocks: int = 8, pattern: int = 0) -> str:
    """A line for each query block, a mark for each key block that it sees."""
    rows = (layout.row(pattern, i) for i in range(blocks))
    return "\n".join("".join(".#"[row >> j & 1] for j in range(blocks)) for row in rows)


# ------------------------------------------------------------------------------------------------ sets of bits
def _below(count: int) -> int:
    """Blocks 0 to count - 1."""
    return (1 << max(0, count)) - 1


def _from(first: int) -> int:
    """All blocks from `first` on: a negative number has ones without end."""
    return -1 << max(0, first)


def _window(i: int, both_ways: int) -> int:
    """Block i and as many before it as a window of so many blocks around i has on each side."""
    return _from(i - both_ways // 2)


def _comb(period: int, count: int) -> int:
    """Blocks 0, period, 2 period ..., `count` of them."""
    return _below(period * count) // _below(period)


def _global(indices: tuple[int, ...], ends: tuple[int, ...] | None) -> int:
    found = 0
    for first, end in zip(indices, ends or [index + 1 for index in indices], strict=True):
        found |= _below(end) & _from(first)
    return found


def _check_globals(indices: tuple[int, ...], ends: tuple[int, ...] | None) -> None:
    """Raises ConfigError for an index below 0, or ends that do not match the indices."""
    if any(index < 0 for index in indices):
        raise ConfigError(f"sparse_attention.global_block_indices: {list(indices)} must be 0 or more")
    if ends is not None and (len(ends) != len(indices) or any(a >= b for a, b in zip(indices, ends, strict=False))):
        raise ConfigError(
            f"sparse_attention.global_block_end_indices: {list(ends)} must have an end above each of {list(indices)}"
        )


def _at_least(least: int, **numbers: int) -> None:
    for name, number in numbers.items():
        if number < least:
            raise ConfigError(f"sparse_attention.{name} must be at least {least}, not {number}")


def _random(count: int, seed: int, head: int, i: int) -> int:
    """`count` different blocks of 0 to i, all when there are not so many: Floyd's sample, drawn by hash."""
    found = 0
    for last in range(max(0, i + 1 - count), i + 1):
        drawn = _hash(seed, head, i, last) % (last + 1)
        found |= 1 << (last if found >> drawn & 1 else drawn)
    return found


def _hash(*numbers: int) -> int:
    """splitmix64 of some numbers, one after another."""
    state = 0
    for number in numbers:
        state = (state + number + 0x9E3779B97F4A7C15) % 2**64
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        state = (state ^ state >> 27) * 0x94D049BB133111EB % 2**64
        state ^= state >> 31
    return state
