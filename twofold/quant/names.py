"""The names of number formats, free of torch, so that a setting can be checked before anything heavy is loaded.

int8              per output, symmetric, activations rounded to int8 as they come
int4              groups of 32 inputs
int4-g64          groups of 64; also -g32, -g128, and -channel (one scale an output)
int4-asym         with a zero for each scale
int4-weight-only  activations stay float; all of these combine: int4-g128-asym-weight-only
"""

from __future__ import annotations

from itertools import product

from ..core import ConfigError, unknown

GROUPS = (0, 32, 64, 128)
USUAL = {8: 0, 4: 32}
"""The group that a name without one means."""


def name_of(bits: int, group: int, symmetric: bool, dynamic: bool) -> str:
    """The shortest name of a format."""
    words = [f"int{bits}"]
    if group != USUAL[bits]:
        words.append(f"g{group}" if group else "channel")
    return "-".join([*words, *([] if symmetric else ["asym"]), *([] if dynamic else ["weight-only"])])


MEANING = {
    name_of(bits, group, symmetric, dynamic): (bits, group, symmetric, dynamic)
    for bits, group, symmetric, dynamic in product((8, 4), GROUPS, (True, False), (True, False))
}
"""Name to (bits, group, symmetric, int8 activations)."""

_LONG = {f"int{bits}-{'g' + str(group) if group else 'channel'}": f"int{bits}" for bits, group in USUAL.items()}


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
