"""Linear layers on CUDA: a row's bits are a function of the row and the weights, for any number of rows.

Shapes: T tokens, K inputs, N outputs, G groups.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..quantized import LANES, Packed, plain
from ..quantized import quantized_linear as quantized_linear_by_widening
from .product import Matrix, multiply
from .quantize import quantize_rows
from .tiles import Kind, Tile, choose


def linear(x_TK: Tensor, w_NK: Tensor, b_N: Tensor | None = None) -> Tensor:
    """`kernels.linear.linear` on CUDA: x Wᵀ + b, added in fp32 and rounded once to x's dtype."""
    return _through(x_TK, Matrix.of(w_NK), b_N)


def quantized_linear(x_TK: Tensor, w: Packed, b_N: Tensor | None = None) -> Tensor:
    """`kernels.quantized.quantized_linear` on CUDA. With float activations, these keep their own dtype."""
    if not plain(w):
        return quantized_linear_by_widening.reference(x_TK, w, b_N)
    return _through(x_TK, Matrix.of(w), b_N)


def _through(x_TK: Tensor, matrix: Matrix, b_N: Tensor | None) -> Tensor:
    T = x_TK.shape[0]
    y_TN = torch.empty(T, matrix.columns, dtype=x_TK.dtype, device=x_TK.device)
    if not y_TN.numel():
        return y_TN
    tile = choose(matrix.kind(x_TK.dtype), T, noise_product)
    x, scale = activations(x_TK, matrix)
    multiply(x, matrix, y_TN, tile, x_scale=scale, bias=b_N)
    return y_TN


def activations(x_TK: Tensor, matrix: Matrix) -> tuple[Tensor, Tensor | None]:
    """Rows as a matrix wants them: as they are, or int8 codes with scales [T, G]."""
    x_TK = x_TK if x_TK.stride(-1) == 1 else x_TK.contiguous()
    return quantize_rows(x_TK, matrix.group) if matrix.dynamic else (x_TK, None)


def noise_product(x_MK: Tensor, kind: Kind, tile: Tile) -> Tensor:
    """x by random weights of a kind, in a given tile: what shows whether two tiles are alike."""
    matrix = noise(kind)
    y_MN = torch.empty(x_MK.shape[0], kind.columns, dtype=kind.dtype, device=x_MK.device)
    x, scale = activations(x_MK, matrix)
    multiply(x, matrix, y_MN, tile, x_scale=scale)
    return y_MN


def noise(kind: Kind) -> Matrix:
    """A random matrix of a kind; the same one every time."""
    generator = torch.Generator().manual_seed(kind.columns)
    N, K, group = kind.columns, kind.inner, kind.group
    if not kind.bits:
        return Matrix.of(torch.randn(N, K, generator=generator).to(kind.device, kind.dtype))
    panels, groups = -(-N // LANES), -(-K // group) if group else 1
    bytes_ = (groups * group if group else K + -K % 8) * kind.bits // 8
    codes = torch.randint(0, 256, (panels, bytes_ // 4, LANES, 4), generator=generator, dtype=torch.uint8)
    scales = torch.rand(panels, groups, LANES, generator=generator)
    codes = codes if kind.bits == 4 else codes.view(torch.int8)
    packed = Packed(codes.to(kind.device), scales.to(kind.device), None, N, K, group, kind.dynamic)
    return Matrix.of(packed)
