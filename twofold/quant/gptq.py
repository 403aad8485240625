"""GPTQ (Frantar et al. 2022): round one input's weights at a time, and let the inputs still to come make up for it.

    for each input j, most energy first:   e = (w_j − ŵ_j) / U_jj        U: upper Cholesky factor of the inverse Hessian
                                           w_i −= e · U_ji  for all i after j

Shapes: N outputs, K inputs, G groups of k inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..core import ConfigError
from ..kernels.quantized import by_groups
from .codes import Quantized, round_to, scales
from .format import Format

BLOCK = 128
"""Inputs whose corrections are gathered before the rest of the weight is touched."""


def gptq(w_NK: Tensor, gram_KK: Tensor, format: Format, *, damp: float = 0.01, act_order: bool = True) -> Quantized:
    """Codes for a weight whose inputs have XᵀX = `gram`.

    With `act_order`, scales are chosen from the weight as it is, and inputs rounded by falling energy; without, a
    group's scales are chosen when its turn comes.

    Raises:
        ConfigError: the Hessian stays singular however much is added to its diagonal (inputs that are not finite).
    """
    w_NK, gram_KK = w_NK.float().clone(), gram_KK.float().clone()
    n, k = w_NK.shape
    energy_K = gram_KK.diagonal().clone()
    dead_K = energy_K == 0
    gram_KK.diagonal()[dead_K] = 1.0
    group = format.group or k
    importance_Gk = by_groups(energy_K, format.group)
    if format.tensor:
        scale_NG, zero_NG = format.one_scale(w_NK)
    else:
        scale_NG, zero_NG = scales(by_groups(w_NK, format.group), format, importance_Gk)
    order_K = torch.argsort(energy_K, descending=True, stable=True) if act_order else torch.arange(k)
    factor_KK = _factor(gram_KK[order_K][:, order_K], damp)
    w_NK = w_NK[:, order_K]
    codes_NK = torch.empty(n, k, dtype=format.code_dtype)
    for first in range(0, k, BLOCK):
        last = min(first + BLOCK, k)
        error_NB = torch.empty(n, last - first)
        for j in range(first, last):
            g = int(order_K[j]) // group
            if not act_order and j % group == 0 and format.group:
                ahead_NGk = by_groups(w_NK[:, j : j + group], group)
                fresh, zeros = scales(ahead_NGk, format, importance_Gk[g : g + 1])
                scale_NG[:, g : g + 1] = fresh
                if zero_NG is not None and zeros is not None:
                    zero_NG[:, g : g + 1] = zeros
            column = Quantized(
                round_to(w_NK[:, j, None, None], *_of(g, scale_NG, zero_NG), format).flatten(1),
                *_of(g, scale_NG, zero_NG),
                format,
            )
            codes_NK[:, j] = column.codes[:, 0]
            wrong_N = (w_NK[:, j] - column.dequantize()[:, 0]) / factor_KK[j, j]
            error_NB[:, j - first] = wrong_N
            w_NK[:, j + 1 : last] -= wrong_N[:, None] * factor_KK[j, None, j + 1 : last]
        w_NK[:, last:] -= error_NB @ factor_KK[first:last, last:]
    back_K = torch.argsort(order_K)
    return Quantized(codes_NK[:, back_K].contiguous(), scale_NG, zero_NG, format)


def _of(g: int, scale_NG: Tensor, zero_NG: Tensor | None) -> tuple[Tensor, Tensor | None]:
    return scale_NG[:, g : g + 1], zero_NG[:, g : g + 1] if zero_NG is not None else None


def _factor(gram_KK: Tensor, damp: float) -> Tensor:
    """The upper Cholesky factor of the inverse; more is added to the diagonal until it exists."""
    mean = gram_KK.diagonal().mean()
    for times in (1.0, 10.0, 100.0):
        damped = gram_KK.clone()
        damped.diagonal().add_(damp * times * mean)
        lower, info = torch.linalg.cholesky_ex(damped)
        if not int(info):
            factor: Tensor
            factor, info = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not int(info):
                return factor
    raise ConfigError("gptq: the inputs' second moments are singular or not finite; calibrate with more text")
