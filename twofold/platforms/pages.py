"""Large tensors straight from the system: zero without being written, and in huge pages where the system has them.

torch.zeros writes what the system hands out zeroed already: two seconds for the cache of a small model, and pages of
4 KB that the processor must look up one by one. numpy asks for zeroed memory, and for huge pages.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

HUGE = 2 << 20
LINE = 64


def zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
    """A tensor of zeros whose pages are taken when they are first touched; torch's own on another device."""
    if torch.device(device).type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    count = math.prod(shape) * dtype.itemsize
    edge = HUGE if count >= 2 * HUGE else LINE
    room = np.zeros(count + edge, dtype=np.uint8)
    first = -room.ctypes.data % edge
    return torch.from_numpy(room[first : first + count]).view(dtype).view(shape)
