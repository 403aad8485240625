"""Calibration: GPTQ against the paper's loop, scales that move and change nothing, layers that see the last one's."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny import LLAMA, MOE, RMS, SPECS, _spec
from torch import Tensor

from twofold.core import ConfigError
from twofold.data.pack import Batch
from twofold.kernels.moe import route
from twofold.models import Decoder, PackedContext
from twofold.models.calibration import blocks, quantize
from twofold.models.quantized import formats, formats_of, quantize_weights
from twofold.models.spec import Gated, Norm, Parallel, Plain, PostOutput, Pre
from twofold.quant import named
from twofold.quant.calibrate import calibrate
from twofold.quant.config import Recipe
from twofold.quant.gptq import gptq
from twofold.quant.observe import Inputs, arguments, listening
from twofold.quant.scaling import Fold, awq_scales, smooth_scales

LAYER = Norm(kind="layer", eps=1e-5, bias=True)
GEMMA = Norm(kind="rms", eps=1e-6, offset=True)
PLACED = {
    **SPECS,
    "shared": _spec(replace(LLAMA, norms=Parallel(norm=LAYER, shared=True)), norm=LAYER),
    "post": _spec(replace(LLAMA, norms=PostOutput(norm=RMS))),
    "relu": _spec(replace(LLAMA, ffn=Plain(width=61, act="relu", bias=True), norms=Pre(norm=LAYER))),
    "offset": _spec(replace(LLAMA, ffn=Gated(width=61, act="gelu_tanh"), norms=Pre(norm=GEMMA)), norm=GEMMA),
    "bare": _spec(replace(LLAMA, norms=Pre(norm=Norm(kind="layer", eps=1e-5, weight=False)))),
}


def made(spec, dtype: torch.dtype = torch.float32) -> Decoder:
    """Random weights whose activations have channels of very different size, as real models' have."""
    decoder = Decoder(spec)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            if "norm" in name and name.endswith("weight"):
                parameter.copy_(torch.exp(0.7 * torch.randn(parameter.shape, generator=generator)))
            else:
                parameter.normal_(0.0, 0.08, generator=generator)
    return decoder.to(dtype)


def batches(count: int = 3, size: int = 90) -> list[Batch]:
    generator = torch.Generator().manual_seed(9)
    found = []
    for _ in range(count):
        ids = torch.randint(0, 131, (size,), generator=generator)
        found.append(Batch(ids, torch.roll(ids, -1), (size // 3, size - size // 3)))
    return found


def hidden(decoder: Decoder, batch: Batch) -> Tensor:
    with torch.no_grad():
        return decoder(batch.ids_T, PackedContext(batch.lengths))


# ------------------------------------------------------------------------------------------------ GPTQ
def papers_loop(w: Tensor, gram: Tensor, name: str, damp: float, act_order: bool) -> Tensor:
    """Algorithm 1 of Frantar et al. without blocks, in fp64: the inverse Hessian loses a row and column an input."""
    format = named(name)
    size = format.group or w.shape[1]
    w, gram = w.double().clone(), gram.double().clone()
    energy = gram.diagonal().clone()
    gram.diagonal().add_(damp * gram.diagonal().mean())
    inverse = torch.linalg.inv(gram)
    scales = format.quantize(w.float(), energy.float())
    order = torch.argsort(energy, descending=True, stable=True) if act_order else torch.arange(w.shape[1])
    done = torch.zeros_like(w)
    for j in order.tolist():
        scale = scales.scale[:, j // size].double()
        step = torch.round(w[:, j] / scale) + (
            scales.zero[:, j // size].double() if scales.zero is not None else format.idle
        )
        zero = scales.zero[:, j // size].double() if scales.zero is not None else format.idle
        done[:, j] = (step.clamp(format.least, format.most) - zero) * scale
        wrong = (w[:, j] - done[:, j]) / inverse[j, j]
        w -= wrong[:, None] * inverse[j]
        inverse = inverse - inverse[:, j, None] * inverse[j] / inverse[j, j]
    return done


def correlated(rows: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(width, width, generator=generator) / width**0.5 + torch.diag(torch.linspace(0.2, 2.0, width))
    return torch.randn(rows, width, generator=generator) @ mix


@pytest.mark.parametrize("name", ["int4", "int4-asym", "int4-channel", "int8-g32"])
def test_gptq_is_the_papers_loop(name: str) -> None:
    x, w = correlated(600, 160), torch.randn(24, 160, generator=torch.Generator().manual_seed(1)) * 0.05
    ours = gptq(w, x.t() @ x, named(name), act_order=True).dequantize()
    theirs = papers_loop(w, x.t() @ x, name, 0.01, act_order=True).float()
    same = (ours - theirs).abs() < 1e-6
    assert same.float().mean() > 0.97  # a tie that falls the other way in fp32 moves what follows it
    loss = [float(((found - w) @ x.t()).square().sum()) for found in (ours, theirs)]
    assert loss[0] < 1.01 * loss[1]


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("name", ["int4", "int4-g128-asym", "int8"])
def test_gptq_loses_less_than_rounding_to_nearest(name: str, act_order: bool) -> None:
    x, w = correlated(600, 200), torch.randn(40, 200, generator=torch.Generator().manual_seed(1)) * 0.05
    format = named(name)
    plain, better = format.quantize(w), gptq(w, x.t() @ x, format, act_order=act_order)
    loss = [float(((found.dequantize() - w) @ x.t()).norm()) for found in (plain, better)]
    assert loss[1] < 0.85 * loss[0]
    assert better.codes.min() >= format.least and better.codes.max() <= format.most


def test_gptq_without_correlations_rounds_to_nearest() -> None:
    w = torch.randn(8, 96)
    format = named("int4")
    importance = torch.arange(1.0, 97.0)
    got = gptq(w, torch.diag(importance), format)
    assert torch.equal(got.codes, format.quantize(w, importance).codes)


def test_gptq_takes_inputs_that_were_never_active() -> None:
    x = correlated(50, 64)
    x[:, 5] = 0
    got = gptq(torch.randn(8, 64), x.t() @ x, named("int4"))
    assert got.dequantize().isfinite().all()
    with pytest.raises(ConfigError, match="more text"):
        gptq(torch.randn(8, 64), torch.full((64, 64), torch.nan), named("int4"))


# ------------------------------------------------------------------------------------------------ scales that move
@pytest.mark.parametrize("kind", PLACED)
def test_folds_leave_the_model_as_it_was(kind: str) -> None:
    decoder, batch = made(PLACED[kind]), batches(1)[0]
    before = hidden(decoder, batch)
    layers, _ = blocks(decoder, formats(decoder, "int4"))
    generator = torch.Generator().manual_seed(4)
    count = 0
    with torch.no_grad():
        for block in layers:
            for fold in block.folds():
                size = int(fold.channel_K.max()) + 1
                fold.apply(torch.exp(torch.randn(size, generator=generator)))
                count += 1
    assert count == len(layers) * {"post": 2, "alibi": 3, "bare": 2, "shared": 3}.get(kind, 4)
    after = hidden(decoder, batch)
    torch.testing.assert_close(after, before, atol=2e-3, rtol=2e-3)


def test_a_mixture_folds_into_router_and_gates_too() -> None:
    decoder = made(SPECS["moe"])
    layers, _ = blocks(decoder, formats(decoder, "int4"))
    folds = {fold.listen: fold for fold in layers[0].folds()}
    assert set(folds) == {f"layers.0.{name}" for name in ("qkv", "out", "experts.gate_up", "shared.down")}
    assert len(folds["layers.0.experts.gate_up"].readers) == 2 and len(folds["layers.0.experts.gate_up"].others) == 2


def test_a_bf16_norm_divides_by_what_it_could_hold() -> None:
    """The norm's own rounding goes into the readers, not into the result."""
    decoder = made(SPECS["llama"]).bfloat16()
    norm, qkv = decoder.layers[0].norm1, decoder.layers[0].qkv
    layers, _ = blocks(decoder, formats(decoder, "int4"))
    (fold,) = [fold for fold in layers[0].folds() if fold.listen == "layers.0.qkv"]
    with torch.no_grad():
        qkv.weight.data = qkv.weight.data.float()
        before = norm.weight.float() * qkv.weight
        fold.apply(torch.linspace(0.31, 3.3, 44))
        torch.testing.assert_close(norm.weight.float() * qkv.weight, before, atol=0, rtol=3e-7)


def fold_over(weight: Tensor, name: str) -> Fold:
    channels = torch.arange(weight.shape[1])
    return Fold(listen="", divide=lambda s: s, channel_K=channels, readers=[(weight, named(name))])


def test_awq_serves_the_inputs_that_matter() -> None:
    x = torch.randn(400, 96) * torch.exp(1.5 * torch.randn(96))
    w = torch.randn(48, 96) * 0.1
    s = awq_scales(fold_over(w, "int4-g32"), x.abs().mean(0), x)
    assert s.max() > 1.5 * s.min()

    def loss(scales: Tensor) -> float:
        rounded = named("int4-g32").quantize(w * scales).dequantize() / scales
        return float(((rounded - w) @ x.t()).norm())

    assert loss(s) < 0.9 * loss(torch.ones(96))


def test_smoothquant_evens_activations_out() -> None:
    x = torch.randn(400, 96)
    x[:, 11] *= 80  # an outlier channel, as large models have
    w = torch.randn(48, 96) * 0.1
    s = smooth_scales(fold_over(w, "int8"), x.abs().amax(0), alpha=0.5)
    format = named("int8")
    plain = format.multiply(x, format.quantize(w)) - x @ w.t()
    smooth = format.multiply(x / s, format.quantize(w * s)) - x @ w.t()
    assert smooth.norm() < 0.4 * plain.norm()


# ------------------------------------------------------------------------------------------------ layer by layer
@pytest.mark.parametrize("method", ["rtn", "gptq", "awq"])
@pytest.mark.parametrize("kind", ["llama", "moe", "gemma2", "alibi"])
def test_every_kind_of_decoder_can_be_calibrated(kind: str, method: str) -> None:
    decoder = made(SPECS[kind])
    before = hidden(decoder, batches(4)[3])
    expected = formats(decoder, "int4")
    told = list(quantize(decoder, Recipe(format="int4", method=method), batches()))
    assert formats_of(decoder) == expected and {item.name for item in told} == set(expected)
    assert all(0 < item.error < 0.5 for item in told)
    assert {item.of for item in told if item.name.startswith("layers.")} == {"outputs"}
    packed = {name: module.packed.nbytes for name, module in decoder.named_modules() if hasattr(module, "packed")}
    assert {item.name: item.bytes for item in told} == packed
    off = (hidden(decoder, batches(4)[3]) - before).norm() / before.norm()
    assert off < 0.35


def test_calibrated_methods_beat_rounding_where_it_counts() -> None:
    """The last hidden states on text that was not calibrated on."""
    test = batches(6)[5]
    truth = hidden(made(SPECS["llama"]), test)
    off = {}
    for method in ("rtn", "gptq", "awq"):
        decoder = made(SPECS["llama"])
        list(quantize(decoder, Recipe(format="int4-weight-only", method=method), batches(5, 150)))
        off[method] = float((hidden(decoder, test) - truth).norm())
    assert off["gptq"] < 0.95 * off["rtn"] and off["awq"] < off["rtn"]


def test_rounding_without_text_is_rounding_while_loading() -> None:
    first, second = made(SPECS["moe"]), made(SPECS["moe"])
    told = list(quantize(first, Recipe(format="int8"), []))
    quantize_weights(second, formats(second, "int8"))
    assert {item.of for item in told} == {"weights"}
    ours, theirs = first.state_dict(), second.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_each_layer_sees_what_the_quantized_ones_before_it_give() -> None:
    decoder = made(SPECS["llama"])
    layers, _ = blocks(decoder, formats(decoder, "int4"))
    calls = [(batch.ids_T, PackedContext(batch.lengths)) for batch in batches(1)]
    for told in calibrate(decoder, layers, calls, Recipe(format="int4")):
        if told.name == "layers.0.down":
            break
    _, x_second = (arguments(decoder, layer, calls[0])[0] for layer in decoder.layers)
    untouched = made(SPECS["llama"])
    assert not torch.equal(x_second, arguments(untouched, untouched.layers[1], calls[0])[0])
    assert formats_of(decoder).keys() == {f"layers.0.{part}" for part in ("qkv", "out", "gate_up", "down")}


def test_listening_counts_every_row_and_keeps_some() -> None:
    layer = torch.nn.Linear(8, 4)
    pieces = [torch.randn(300, 8) for _ in range(4)]
    with torch.no_grad(), listening({"x": (layer, lambda args: args[:1])}, 4, gram=True) as heard:
        for piece in pieces:
            layer(piece)
    (found,) = heard["x"]
    whole = torch.cat(pieces)
    assert found.count == 1200 and isinstance(found, Inputs)
    torch.testing.assert_close(found.gram_KK, whole.t() @ whole, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(found.importance, whole.square().mean(0))
    assert torch.equal(found.top_K, whole.abs().amax(0))
    assert 400 <= len(found.rows) <= 512
    assert not layer._forward_pre_hooks


def test_experts_hear_only_their_own_tokens() -> None:
    decoder = made(SPECS["moe"])
    layers, _ = blocks(decoder, formats(decoder, "int4"))
    (site,) = [site for site in layers[0].sites if site.name.endswith("experts.down")]
    spec = MOE.ffn
    x, routed = torch.randn(50, 44), route(torch.randn(50, spec.experts), spec.top_k, True)
    seen = site.inputs((x, *routed))
    assert [part.shape[1] for part in seen] == [spec.width] * spec.experts
    assert sum(len(part) for part in seen) == 50 * spec.top_k


# ------------------------------------------------------------------------------------------------ what is refused
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"format": "int4", "method": "smoothquant"}, "int4 cannot hold"),
        ({"format": "int8", "method": "smoothquant", "weight_only": True}, "weight-only has none"),
        ({"group": 48}, "group must be 0, 32, 64, 128, not 48"),
        ({"alpha": 1.5}, "alpha"),
        ({"damp": 0.0}, "damp"),
        ({"format": "int3"}, "unknown number format"),
    ],
)
def test_recipes_that_cannot_be(given: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Recipe(**given)


def test_recipe_names() -> None:
    assert Recipe().name == "int4"
    assert Recipe(format="int8", group=64, asymmetric=True).name == "int8-g64-asym"
    assert Recipe(format="int4-g128", weight_only=True).name == "int4-g128-weight-only"
    assert Recipe(format="int4-g128-asym", group=32).name == "int4-asym"


def test_methods_that_look_need_something_to_look_at() -> None:
    with pytest.raises(ConfigError, match="gptq looks at what passes"):
        list(quantize(made(SPECS["llama"]), Recipe(method="gptq"), []))
    decoder = made(SPECS["llama"])
    list(quantize(decoder, Recipe(), []))
    with pytest.raises(ConfigError, match="quantized already"):
        list(quantize(decoder, Recipe(), []))
