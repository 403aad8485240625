"""Number formats: what a code means, that nothing clips, that the arithmetic is exact, and how weights are cut."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from twofold.core import ConfigError
from twofold.kernels.linear import linear
from twofold.kernels.quantized import (
    fused_multiply_add,
    quantize_rows,
    quantized_experts,
    quantized_linear,
    quantized_rows,
    unpack,
)
from twofold.quant import FORMATS, Format, Quantized, QuantLinear, named, short

SHAPES = ((1, 1), (16, 32), (37, 200), (5, 129), (48, 64))
SOME = ("int8", "int8-g64-asym", "int4", "int4-g128-asym", "int4-channel-weight-only", "int8-g32-weight-only")


def weights(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.02


# ------------------------------------------------------------------------------------------------ names
def test_names_say_what_they_mean() -> None:
    for name in FORMATS:
        assert named(name).name == name == short(name)
    assert named("int4-g32-asym") == named("int4-asym")
    assert named("int8-channel") == named("int8") == Format(bits=8)
    assert named("int4") == Format(bits=4, group=32)
    assert named("int4-g64-asym-weight-only") == Format(bits=4, group=64, symmetric=False, activations="float")


@pytest.mark.parametrize(
    ("given", "nearest"), [("int4-g63", "int4-g6"), ("int-8", "int8"), ("int4-assym", "int4-asym")]
)
def test_a_wrong_name_has_a_nearest(given: str, nearest: str) -> None:
    with pytest.raises(ConfigError, match=f"unknown number format '{given}': did you mean '{nearest}"):
        named(given)


def test_what_a_format_refuses() -> None:
    with pytest.raises(ConfigError, match="group must be 0 or 16 or 32 or 64 or 128, not 48"):
        Format(bits=4, group=48)
    with pytest.raises(ConfigError, match="damaged"):
        named("int8").quantize(torch.tensor([[1.0, math.nan]]))
    with pytest.raises(ConfigError, match="use a group of 128"):
        named("int8").empty(16, 100_000, device="meta")
    named("int8-g128").empty(16, 100_000, device="meta")


# ------------------------------------------------------------------------------------------------ codes and panels
@pytest.mark.parametrize("name", list(FORMATS))
def test_panels_there_and_back(name: str) -> None:
    format = named(name)
    for n, k in SHAPES:
        quantized = format.quantize(weights(n, k))
        packed = format.pack(quantized)
        again = format.unpack(packed)
        assert torch.equal(again.codes, quantized.codes) and torch.equal(again.scale, quantized.scale)
        assert (again.zero is None) == (quantized.zero is None) == format.symmetric
        assert again.zero is None or torch.equal(again.zero, quantized.zero)
        assert packed.nbytes == format.bytes(n, k)
        empty = format.empty(n, k)
        assert empty.codes.shape == packed.codes.shape and empty.scales.shape == packed.scales.shape


def test_panels_lie_as_the_picture_says() -> None:
    """One number of the weight, found in the panels by hand."""
    w = weights(40, 64)
    for name in ("int8-g32-asym", "int4-asym"):
        quantized = named(name).quantize(w)
        packed = quantized.pack()
        for n, k in ((0, 0), (17, 5), (39, 63), (16, 34)):
            if packed.bits == 8:
                found = int(packed.codes[n // 16, k // 4, n % 16, k % 4])
            else:
                byte = int(packed.codes[n // 16, k // 8, n % 16, k % 4])
                found = byte >> 4 if k % 8 >= 4 else byte & 15
            assert found == int(quantized.codes[n, k])
            assert packed.scales[n // 16, k // 32, n % 16] == quantized.scale[n, k // 32]
        filled = unpack(packed._replace(n=48, k=64))
        assert not filled.scale[40:].any()


@pytest.mark.parametrize("name", list(FORMATS))
def test_nothing_is_off_by_more_than_half_a_step(name: str) -> None:
    format, w = named(name), weights(33, 256)
    quantized = format.quantize(w)
    off = (quantized.dequantize() - w).abs()
    step = quantized.scale.float().abs().repeat_interleave(format.group or 256, -1)
    limit = 0.5 if format.symmetric else 1.0  # a zero is rounded too
    if format.numbers == "fp8":  # three bits behind the leading one, or steps of 2⁻⁹ among the smallest
        step = torch.maximum(2.0 ** torch.floor(torch.log2((w / step).abs())) / 8, torch.tensor(2.0**-9)) * step
    assert (off <= limit * step * (1 + 1e-5)).all()
    codes = quantized.codes.float()
    assert codes.min() >= format.least and codes.max() <= format.most


def test_the_longer_side_of_symmetric_int4_gets_eight_steps() -> None:
    w = torch.zeros(2, 32)
    w[0, 0], w[0, 1], w[1, 0] = 0.8, -0.7, -0.8
    quantized = named("int4").quantize(w)
    assert quantized.scale[0] < 0 < quantized.scale[1]
    torch.testing.assert_close(quantized.dequantize(), w, atol=0.004, rtol=0)


@pytest.mark.parametrize("name", SOME)
def test_zeros_stay_zeros(name: str) -> None:
    quantized = named(name).quantize(torch.zeros(16, 128))
    assert torch.equal(quantized.dequantize(), torch.zeros(16, 128))
    assert torch.equal(quantized_linear(torch.randn(3, 128), quantized.pack()), torch.zeros(3, 16))


@pytest.mark.parametrize("scale", ["bfloat16", "float16", "float32"])
def test_scales_are_rounded_away_from_zero(scale: str) -> None:
    format = Format(bits=8, scale=scale)  # type: ignore[arg-type]
    w = weights(200, 64)
    chosen = format.quantize(w).scale
    exact = w.abs().amax(-1, keepdim=True) / 127
    assert str(chosen.dtype) == f"torch.{scale}"
    assert (chosen.float() >= exact).all() and (chosen.float() <= exact * 1.01).all()


def test_importance_clips_where_that_loses_less() -> None:
    w = weights(64, 128)
    w[:, 7] *= 20  # one long weight a row, at an input that is never active
    importance = torch.ones(128)
    importance[7] = 0.0
    format = named("int4-g128")
    plain, clipped = format.quantize(w), format.quantize(w, importance)
    errors = [((q.dequantize() - w).square() * importance).sum() for q in (plain, clipped)]
    assert errors[1] < 0.7 * errors[0]


# ------------------------------------------------------------------------------------------------ arithmetic
def rounded(value: Fraction) -> np.float32:
    """The fp32 nearest to an exact number, ties to even."""
    near = np.float32(float(value))
    around = sorted({np.nextafter(near, np.float32(-np.inf)), near, np.nextafter(near, np.float32(np.inf))})
    return min(around, key=lambda x: (abs(Fraction(float(x)) - value), int(x.view(np.uint32)) & 1))


floats = st.floats(-1e6, 1e6, width=32).map(lambda x: float(np.float32(x)))


@settings(max_examples=200)
@given(floats, floats, floats)
def test_fused_multiply_add_rounds_once(a: float, b: float, c: float) -> None:
    got = fused_multiply_add(*(torch.tensor([x]) for x in (a, b, c)))
    assert np.float32(got.item()) == rounded(Fraction(a) * Fraction(b) + Fraction(c))


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_fused_multiply_add_where_rounding_twice_goes_astray(sign: float) -> None:
    """a·b is 2⁻⁷⁰ short of half a step of c: an fp64 sum loses that, and then sees a tie."""
    a, b, c = (torch.tensor([x]) for x in (sign * 2.0**-24 * (1 + 2.0**-23), 1 - 2.0**-23, sign * (1 + 2.0**-23)))
    assert (a.double() * b.double() + c.double()).float().item() == sign * (1 + 2.0**-22)
    assert fused_multiply_add(a, b, c).item() == sign * (1 + 2.0**-23)
    assert rounded(Fraction(a.item()) * Fraction(b.item()) + Fraction(c.item())) == sign * (1 + 2.0**-23)


def slow_product(x: Tensor, quantized: Quantized, format: Format) -> np.ndarray:
    """The definition in whole numbers and fractions, one output at a time."""
    a, scale_a = quantize_rows.reference(x, format.group)
    codes, scales = quantized.codes.long().numpy(), quantized.scale.float().numpy()
    size = format.group or x.shape[1]
    out = np.zeros((len(x), len(codes)), dtype=np.float32)
    for m in range(len(x)):
        for n in range(len(codes)):
            for g in range(scales.shape[1]):
                part = slice(g * size, (g + 1) * size)
                zero = format.idle if quantized.zero is None else int(quantized.zero[n, g])
                total = int((a[m, part].long().numpy() * (codes[n, part] - zero)).sum())
                both = np.float32(scales[n, g] * scale_a[m, g].numpy())
                out[m, n] = rounded(
                    Fraction(float(np.float32(total))) * Fraction(float(both)) + Fraction(float(out[m, n]))
                )
    return out


@pytest.mark.parametrize("name", ["int8", "int8-asym", "int8-g32-asym", "int4", "int4-asym", "int4-g64"])
def test_the_reference_is_exact(name: str) -> None:
    format = named(name)
    x, quantized = torch.randn(3, 150, generator=torch.Generator().manual_seed(1)), format.quantize(weights(5, 150))
    expected = slow_product(x, quantized, format)
    assert np.array_equal(format.multiply(x, quantized).numpy(), expected)
    assert np.array_equal(quantized_linear(x, quantized.pack()).numpy(), expected)


@pytest.mark.parametrize("name", SOME)
def test_a_row_has_one_bit_pattern(name: str) -> None:
    format = named(name)
    x, packed = torch.randn(40, 192), format.quantize(weights(50, 192)).pack()
    bias = torch.randn(50)
    whole = quantized_linear(x, packed, bias)
    for rows in (slice(0, 1), slice(7, 8), slice(3, 20)):
        assert torch.equal(quantized_linear(x[rows], packed, bias), whole[rows])
    assert quantized_linear(x[:0], packed, bias).shape == (0, 50)


def test_weight_only_is_the_float_product() -> None:
    format = named("int4-weight-only")
    x, quantized = torch.randn(9, 96), format.quantize(weights(20, 96))
    assert torch.equal(quantized_linear(x, quantized.pack()), linear(x, quantized.dequantize()))


@pytest.mark.parametrize("group", [0, 32])
def test_activations_round_by_row_and_group(group: int) -> None:
    x = torch.zeros(5, 64)
    x[0, :3] = torch.tensor([127.0, 2.5, -3.5])  # ties go to even
    x[1] = 1e-35  # as good as zero
    x[2, 40] = torch.inf
    x[3, 1] = torch.nan
    codes, scale = quantize_rows(x, group)
    assert codes[0, :3].tolist() == [127, 2, -4] and scale[0, 0] == 1.0
    assert not codes[1].any() and not scale[1].any()
    assert scale[2].isnan().any() and scale[3].isnan().any() and not scale[4].any()
    y = quantized_linear(x, Format(bits=8, group=group).quantize(weights(16, 64)).pack())
    assert y[2].isnan().all() and y[3].isnan().all() and y[[0, 1, 4]].isfinite().all()


# ------------------------------------------------------------------------------------------------ cuts
@pytest.mark.parametrize("name", SOME)
def test_parts_of_a_cut_add_up(name: str) -> None:
    format, x = named(name), torch.randn(4, 512)
    quantized = format.quantize(weights(32, 512))
    rows = [format.cut(quantized, 0, rank, 4) for rank in range(4)]
    assert torch.equal(torch.cat([format.multiply(x, part) for part in rows], -1), format.multiply(x, quantized))
    columns = [format.cut(quantized, 1, rank, 4) for rank in range(4)]
    assert torch.equal(torch.cat([part.dequantize() for part in columns], -1), quantized.dequantize())
    total = sum(format.multiply(piece, part) for piece, part in zip(x.split(128, -1), columns, strict=True))
    torch.testing.assert_close(total, x @ quantized.dequantize().t(), atol=0.02, rtol=0.05)


def test_an_illegal_cut_names_the_nearest() -> None:
    quantized = named("int4-g128").quantize(weights(30, 768))
    with pytest.raises(ConfigError, match=r"768 inputs in groups of 128 cannot be cut in 4 equal parts: use 3 or 6"):
        quantized.format.cut(quantized, 1, 0, 4)
    with pytest.raises(ConfigError, match=r"30 outputs cannot be cut in 4 equal parts: use 3 or 5"):
        quantized.format.cut(quantized, 0, 0, 4)


# ------------------------------------------------------------------------------------------------ modules
def test_a_quantized_layer_is_layer_and_table() -> None:
    w, bias = weights(37, 100), nn.Parameter(torch.randn(37))
    module = QuantLinear.of(named("int8").quantize(w), bias)
    x = torch.randn(6, 100)
    torch.testing.assert_close(module(x), x @ w.t() + bias, atol=0.03, rtol=0.03)
    ids = torch.tensor([0, 36, 5, 5])
    assert torch.equal(module.rows(ids), module.quantized.dequantize()[ids])
    assert module.shape == (37, 100) and module.dtype == torch.float32
    assert module.to(torch.bfloat16).scales.dtype == torch.bfloat16
    assert QuantLinear.of(Format(bits=8, scale="float32").quantize(w)).to(torch.bfloat16).scales.dtype == torch.float32
    before = module.packed
    module.put(named("int8").quantize(w * 2))
    assert module.packed.codes is before.codes and torch.equal(module.scales, before.scales)
    torch.testing.assert_close(module.quantized.dequantize(), 2 * w, atol=0.002, rtol=0.01)


@pytest.mark.parametrize("name", ["int4-asym", "int8", "int4-g64-weight-only"])
def test_experts_are_quantized_one_by_one(name: str) -> None:
    format = named(name)
    up, down = weights(3, 2 * 24, 64), weights(3, 64, 24, seed=1)
    packed = [format.quantize(w).pack() for w in (up, down)]
    alone = [format.quantize(w) for w in up]
    together = format.unpack(packed[0])
    assert all(torch.equal(together.codes[e], one.codes) for e, one in enumerate(alone))
    assert format.unpack(packed[0].expert(2)).codes.equal(alone[2].codes)
    x, chosen = torch.randn(7, 64), torch.tensor([[0, 2]] * 7)
    shares = torch.full((7, 2), 0.5)
    got = quantized_experts(x, *packed, shares, chosen, "silu")
    expected = torch.zeros(7, 64)
    for e in (0, 2):
        gate, rest = (x @ alone[e].dequantize().t()).chunk(2, -1)
        expected += 0.5 * (torch.nn.functional.silu(gate) * rest) @ format.quantize(down[e]).dequantize().t()
    torch.testing.assert_close(got, expected, atol=2e-3, rtol=0.1)


def test_rows_of_a_table_from_every_format() -> None:
    ids = torch.tensor([3, 0, 32])
    for name in FORMATS:
        quantized = named(name).quantize(weights(33, 70))
        assert torch.equal(quantized_rows(ids, quantized.pack()), quantized.dequantize()[ids])
