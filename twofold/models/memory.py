"""Memory for a module that was built on the meta device, where nothing takes any."""

from __future__ import annotations

import torch
from torch import nn

from ..platforms.pages import zeros


def give_memory(module: nn.Module, device: torch.device | str, dtype: torch.dtype | None = None) -> None:
    """Zeros for every parameter and buffer of a module that has none of its own yet; parameters become `dtype`.

    What `to_empty` and `to` would do, without the copies on the meta device for which torch imports all of sympy.
    """
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            fresh = zeros(tuple(parameter.shape), dtype or parameter.dtype, device)
            part._parameters[name] = nn.Parameter(fresh, parameter.requires_grad)
        for name, buffer in part.named_buffers(recurse=False):
            part._buffers[name] = zeros(tuple(buffer.shape), buffer.dtype, device)
