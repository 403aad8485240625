"""Calibration: a model quantized layer by layer, each seeing what the layers before it, already quantized, give it.

    texts ▸ model up to the first block ▸ [ listen ▸ fold scales ▸ listen, round, put in place ▸ run ] × blocks

It takes any module whose blocks are called one after another as block(x, ...) → x, and what is around them as plain
values (`Block`, `Site`, `Fold`); only one block's float weights are widened at a time.

Shapes: K inputs, N outputs; experts have one more dimension in front.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .codes import Quantized
from .config import Recipe
from .format import Format
from .gptq import gptq
from .observe import Inputs, Taps, arguments, listening, together
from .scaling import Fold, awq_scales, smooth_scales


def first_argument(args: tuple[Any, ...]) -> Sequence[Tensor]:
    """What a linear layer is called with."""
    return args[:1]


@dataclass(frozen=True, kw_only=True, slots=True)
class Site:
    """One weight to be quantized: `weight` [N, K] or [experts, N, K]; `place` puts the result into the model.

    `listen` is the module whose call shows its inputs; `inputs` takes them from the call's arguments, one an expert.
    """

    name: str
    weight: nn.Parameter
    format: Format
    listen: nn.Module
    place: Callable[[Quantized], None]
    inputs: Callable[[tuple[Any, ...]], Sequence[Tensor]] = first_argument


@dataclass(frozen=True, kw_only=True, slots=True)
class Block:
    """One layer: the `module`, called as module(x, ...) → x; its sites in the order of use; where scales may move."""

    module: nn.Module
    sites: Sequence[Site]
    folds: Callable[[], Sequence[Fold]] = tuple


@dataclass(frozen=True, kw_only=True, slots=True)
class Told:
    """How well a site was rounded: the error of its outputs, or of its weights when no text passed, as a share."""

    name: str
    error: float
    of: str
    bytes: int


@torch.no_grad()
def calibrate(
    model: nn.Module, blocks: Sequence[Block], batches: Iterable[tuple[Any, ...]], recipe: Recipe
) -> Iterator[Told]:
    """Quantize every site of `blocks` in place, telling of each as it is done; `batches` are the model's arguments.

    Without batches, weights are rounded to nearest and the error told is the weights' own.
    """
    calls = [arguments(model, blocks[0].module, batch) for batch in batches] if blocks else []
    for block in blocks:
        for site in block.sites:
            site.weight.data = site.weight.data.float()
        if calls and recipe.method in ("awq", "smoothquant"):
            _fold(block, calls, recipe)
        for site in block.sites:
            heard = _listen(block, [site], calls, gram=recipe.method == "gptq")[site.name] if calls else []
            yield _round(site, heard, recipe)
        calls = [(block.module(*args), *args[1:]) for args in calls]


def round_site(site: Site) -> Told:
    """Round one site to nearest, without looking at inputs."""
    return _round(site, [], Recipe())


def _listen(
    block: Block, sites: Sequence[Site], calls: Sequence[tuple[Any, ...]], gram: bool
) -> dict[str, list[Inputs]]:
    taps: Taps = {site.name: (site.listen, site.inputs) for site in sites}
    with listening(taps, len(calls), gram) as heard:
        for args in calls:
            block.module(*args)
    return heard


def _fold(block: Block, calls: Sequence[tuple[Any, ...]], recipe: Recipe) -> None:
    """Move scales: where a fold's readers see the inputs of one site, and that site heard any."""
    heard = _listen(block, block.sites, calls, gram=False)
    for fold in block.folds():
        inputs = together(heard[fold.listen])
        if inputs.magnitude_K is None or inputs.top_K is None:
            continue
        if recipe.method == "awq":
            fold.apply(awq_scales(fold, inputs.magnitude_K / inputs.count, inputs.rows))
        elif fold.norm:
            fold.apply(smooth_scales(fold, inputs.top_K, recipe.alpha))


def _round(site: Site, heard: Sequence[Inputs], recipe: Recipe) -> Told:
    weight, format = site.weight.detach().float(), site.format
    matrices = weight[None] if weight.dim() == 2 else weight
    if not heard:
        found = [format.quantize(matrix) for matrix in matrices]
    else:
        found = [_codes(matrix, inputs, format, recipe) for matrix, inputs in zip(matrices, heard, strict=True)]
    off = truth = 0.0
    for index, (matrix, quantized) in enumerate(zip(matrices, found, strict=True)):
        rows = heard[index].rows if heard else torch.empty(0, 0)
        wrong, right = quantized.dequantize() - matrix, matrix
        if heard:
            wrong, right = (rows @ x.t() if len(rows) else x.new_zeros(0) for x in (wrong, right))
        off, truth = off + float(wrong.square().sum()), truth + float(right.square().sum())
    whole = found[0] if weight.dim() == 2 else _stack(found)
    site.place(whole)
    return Told(
        name=site.name,
        error=(off / truth) ** 0.5 if truth else 0.0,
        of="outputs" if heard else "weights",
        bytes=len(found) * format.bytes(*matrices.shape[1:]),
    )


def _codes(w_NK: Tensor, inputs: Inputs, format: Format, recipe: Recipe) -> Quantized:
    """One matrix by the recipe's method; to nearest where no input came (an expert that nobody chose)."""
    if recipe.method == "gptq" and inputs.gram_KK is not None:
        return gptq(w_NK, inputs.gram_KK, format, damp=recipe.damp, act_order=recipe.act_order)
    if recipe.method == "awq":
        return format.quantize(w_NK, inputs.importance)
    return format.quantize(w_NK)


def _stack(found: Sequence[Quantized]) -> Quantized:
    zeros = [quantized.zero for quantized in found if quantized.zero is not None]
    return Quantized(
        torch.stack([quantized.codes for quantized in found]),
        torch.stack([quantized.scale for quantized in found]),
        torch.stack(zeros) if zeros else None,
        found[0].format,
    )
