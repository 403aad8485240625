"""The names of number formats, free of torch, so that a setting can be checked before anything heavy is loaded.

int8              per output, symmetric, activations rounded to int8 as they come, row by row (ZeroQuant's token-wise)
int8-tensor       one scale for a whole matrix
int4              groups of 32 inputs
int4-g64          groups of 64; also -g32, -g128, and -channel (one scale an output)
int4-asym         with a zero for each scale
int4-weight-only  activations stay float; all of these combine: int4-g128-asym-weight-only
fp8               e4m3 numbers with one scale an output, activations stay float; also fp8-tensor, -g32, -g64, -g128

What other tools write can have more: groups of 16, and zeros that are floats ("-offset").
"""

from __future__ import annotations

from itertools import product
from typing import NamedTuple

from ..core import ConfigError, unknown

GROUPS = (0, 32, 64, 128)
"""Inputs that may share a scale, where we choose."""
READ_GROUPS = (0, 16, 32, 64, 128)
"""The same, where a checkpoint did."""
USUAL = {"int8": 0, "int4": 32, "fp8": 0}
"""The group that a name without one means."""


class Meaning(NamedTuple):
    """What a name says; `tensor`: one scale a matrix. `offset`: zeros are floats, which no name of ours says."""

    kind: str
    group: int
    symmetric: bool = True
    dynamic: bool = True
    tensor: bool = False
    offset: bool = False

    @property
    def name(self) -> str:
        """The shortest name."""
        words = [self.kind]
        if self.tensor:
            words.append("tensor")
        elif self.group != USUAL[self.kind]:
            words.append(f"g{self.group}" if self.group else "channel")
        if not self.symmetric:
            words.append("offset" if self.offset else "asym")
        if not self.dynamic and self.kind != "fp8":
            words.append("weight-only")
        return "-".join(words)


_ALL = [
    *(Meaning(*each) for each in product(("int8", "int4"), GROUPS, (True, False), (True, False))),
    *(Meaning("int8", 0, symmetric, dynamic, True) for symmetric, dynamic in product((True, False), (True, False))),
    *(Meaning("fp8", group, True, False) for group in GROUPS),
    Meaning("fp8", 0, True, False, True),
]
MEANING = {meaning.name: meaning for meaning in _ALL}
"""Every name, and what it means."""

_LONG = {f"{kind}-{'g' + str(group) if group else 'channel'}": kind for kind, group in USUAL.items()}


def short(name: str) -> str:
    """The name as it is listed: "int4-g32-asym" is "int4-asym".

    Raises:
        ConfigError: no format of that name; the message has the nearest.
    """
    for long, usual in _LONG.items():
        if name == long or name.startswith(long + "-"):
            name = usual + name.removeprefix(long)
    if name not in MEANING:
        raise ConfigError(unknown("number format", name, MEANING))
    return name
