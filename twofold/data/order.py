"""The order in which a loader reads: a function of a seed and an epoch, so that a run's place in its data is a number.

position   0 1 2 3 4 5 6 7 8 9 ...      epochs of n = 4 end to end
item       2 0 3 1│1 3 0 2│0 2 ...      a permutation for each epoch
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ..core import ConfigError

_KEYS = (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)  # splitmix64
_SEED = 0x100000001B3


class Order:
    """`size` things in an order of its own for each epoch, end to end.

    Raises:
        ConfigError: nothing to order.
    """

    def __init__(self, size: int, *, seed: int = 0, shuffle: bool = True) -> None:
        if size < 1:
            raise ConfigError("there is nothing to read: every row was held out or dropped, or there is none")
        self.size, self._seed, self._shuffle = size, seed, shuffle
        self._epochs: dict[int, npt.NDArray[np.int64]] = {}

    def epoch(self, number: int) -> npt.NDArray[np.int64]:
        """The order of one epoch; the last two asked for are kept."""
        if number not in self._epochs:
            plain = np.arange(self.size, dtype=np.int64)
            self._epochs = {key: order for key, order in self._epochs.items() if key == number - 1}
            self._epochs[number] = permutation(self.size, self._seed * _SEED + number) if self._shuffle else plain
        return self._epochs[number]

    def take(self, first: int, last: int) -> list[int]:
        """What stands at positions first to last, exclusive."""
        return [int(self.epoch(place // self.size)[place % self.size]) for place in range(first, last)]


def permutation(size: int, key: int) -> npt.NDArray[np.int64]:
    """A permutation of range(size) that is a function of `key` alone, on every machine and version.

    A four-round Feistel network on the smallest even number of bits that holds `size`; numbers that fall outside walk
    on until they fall inside (Black and Rogaway 2002).
    """
    half = max(1, (max(size - 1, 1).bit_length() + 1) // 2)
    mask = np.uint64((1 << half) - 1)
    shift = np.uint64(half)
    place = np.arange(size, dtype=np.uint64)
    walking = np.ones(size, dtype=bool)
    while walking.any():
        left, right = place[walking] >> shift, place[walking] & mask
        for turn in range(4):
            mixed = _mix(right, (key * 4 + turn) * 0x632BE59BD9B4E019) & mask
            left, right = right, left ^ mixed
        place[walking] = (left << shift) | right
        walking = place >= size
    return place.astype(np.int64)


def _mix(value: npt.NDArray[np.uint64], key: int) -> npt.NDArray[np.uint64]:
    with np.errstate(over="ignore"):
        value = value + np.uint64((key + _KEYS[0]) % 2**64)
        value = (value ^ (value >> np.uint64(30))) * np.uint64(_KEYS[1])
        value = (value ^ (value >> np.uint64(27))) * np.uint64(_KEYS[2])
        return value ^ (value >> np.uint64(31))
