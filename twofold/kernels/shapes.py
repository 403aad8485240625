"""What the name of a tensor says of its shape: `gate_up_T2F` is [T, 2F].

    x_TD         (1, T) (1, D)      each letter is a dimension
    gate_up_T2F  (1, T) (2, F)      a number before a letter multiplies it
    mask_1T      (1,  ) (1, T)      a number alone is that size
    x, top_k     nothing            no suffix in capitals, nothing is known

A letter has one size in a call, whichever tensors carry it.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence

from ..core import ConfigError

_SUFFIX = re.compile(r"_([A-Z0-9][A-Za-z0-9]*)$")
_AXIS = re.compile(r"(\d*)([A-Za-z]?)")

Axis = tuple[int, str]


@functools.cache
def axes(name: str) -> tuple[Axis, ...] | None:
    """Factor and letter of each dimension, or None for a name without a suffix."""
    suffix = _SUFFIX.search(name)
    if suffix is None:
        return None
    return tuple((int(factor or 1), letter) for factor, letter in _AXIS.findall(suffix.group(1)) if factor or letter)


def letters(name: str) -> set[str]:
    """The dimensions that a name speaks of."""
    return {letter for _, letter in axes(name) or () if letter}


def learn(sizes: dict[str, int], name: str, shape: Sequence[int]) -> None:
    """Add to `sizes` what a tensor of this shape says of the letters in its name.

    Raises:
        ConfigError: another number of dimensions, or a size that the letters seen so far do not allow.
    """
    found = axes(name)
    if found is None:
        return
    if len(shape) != len(found):
        raise ConfigError(
            f"{name} has the shape {tuple(shape)}, {len(shape)} dimensions; its name says {_spelled(found)}"
        )
    for size, (factor, letter) in zip(shape, found, strict=True):
        known = sizes.setdefault(letter, size // factor) if letter else 1
        if size != known * factor:
            so = f" and {letter} is {known}" if letter and not size % factor else ""
            raise ConfigError(f"{name} has the shape {tuple(shape)}; its name says {_spelled(found)}{so}")


def _spelled(found: tuple[Axis, ...]) -> str:
    return f"[{', '.join(f'{factor if factor > 1 or not letter else str()}{letter}' for factor, letter in found)}]"


def shape_of(name: str, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """The shape of a tensor of this name. Raises ConfigError for a name without a suffix."""
    found = axes(name)
    if found is None:
        raise ConfigError(f"'{name}' does not say its shape: end it in one letter a dimension, such as {name}_TD")
    return tuple(factor * sizes[letter] if letter else factor for factor, letter in found)
