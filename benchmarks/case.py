"""What a kernel is measured with: a case of an op, and the sizes of the reference model.

A case says how many bytes must come from or go to memory at least (each operand once) and how many operations must be
done (two for each multiply-add), so that a time can be held against the machine's limits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, Literal

from torch import Tensor

Args = tuple[Any, ...]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One op at one size: `make` draws arguments afresh, `moved` bytes and `done` operations are the least there is.

    `plain` is what a user of torch would call with the same arguments; without one it is the op's own definition.
    """

    label: str
    make: Callable[[], Args]
    moved: int
    done: int = 0
    unit: Literal["fp32", "int8"] = "fp32"
    plain: Callable[..., Any] | None = None
    keywords: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Tokens of a decode step of many, of a prefill, and of the context that attention looks back on."""

    batch: int = 32
    prompt: int = 512
    context: int = 1024


QUICK = Sizes(batch=8, prompt=64, context=128)
CASES: dict[str, Callable[[Sizes], Iterator[Case]]] = {}


def cases(op: str) -> Callable[[Callable[[Sizes], Iterator[Case]]], Callable[[Sizes], Iterator[Case]]]:
    """Decorator: these are the cases of the op of this name."""

    def add(make: Callable[[Sizes], Iterator[Case]]) -> Callable[[Sizes], Iterator[Case]]:
        CASES[op] = make
        return make

    return add


def tensors(value: Any) -> Iterator[Tensor]:
    """All tensors in some arguments, those in lists, tuples and dataclasses too (caches, packed weights, shards)."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for each in value:
            yield from tensors(each)
    elif is_dataclass(value):
        for each in fields(value):
            yield from tensors(getattr(value, each.name))


def held(value: Any) -> int:
    """Bytes of all tensors in some arguments."""
    return sum(each.numel() * each.element_size() for each in tensors(value))


def stages(sizes: Sizes) -> list[tuple[str, int]]:
    return [("decode 1", 1), (f"decode {sizes.batch}", sizes.batch), (f"prefill {sizes.prompt}", sizes.prompt)]


def few(sizes: Sizes) -> list[tuple[str, int]]:
    return [stages(sizes)[0], stages(sizes)[-1]]
