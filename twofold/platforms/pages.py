"""Large tensors straight from the system: zero without being written, and in huge pages where the system has them.

torch.zeros writes what the system hands out zeroed already: two seconds for the cache of a small model, and pages of
4 KB that the processor must look up one by one. numpy asks for zeroed memory, and for huge pages.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

LINE = 64  # bytes of a line of the cache: where a tensor begins


def zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
    """A tensor of zeros whose pages are taken when they are first touched; torch's own on another device."""
    if torch.device(device).type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    count = math.prod(shape) * dtype.itemsize
    room = np.zeros(count + LINE, dtype=np.uint8)
    first = -room.ctypes.data % LINE
    return torch.from_numpy(room[first : first + count]).view(dtype).view(shape)
