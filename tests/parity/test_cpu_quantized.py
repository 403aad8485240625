"""Products with quantized weights by the CPU kernels: bit for bit what the definition in torch gives."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import Tensor

from twofold.core import ConfigError
from twofold.kernels import native, panels
from twofold.kernels.activation import activate, gated
from twofold.kernels.build import FLAGS
from twofold.kernels.linear import linear
from twofold.kernels.quantized import Packed, dequantize, quantized_linear, quantized_rows, unpack
from twofold.platforms import find_compiler
from twofold.quant.format import FORMATS, SCALES, Format
from twofold.quant.linear import QuantLinear
from twofold.quant.names import GROUPS

pytestmark = pytest.mark.skipif(native.library() is None, reason=f"no CPU kernels: {native.missing()}")
SHAPES = [(1, 16, 8), (3, 33, 40), (6, 16, 128), (7, 100, 257), (64, 48, 96), (300, 200, 320), (2, 5, 1), (0, 16, 64)]


def weight(format: Format, n: int, k: int, seed: int = 0) -> Packed:
    """Random weights with outliers, a row of zeros and a group of zeros."""
    generator = torch.Generator().manual_seed(seed)
    w_NK = torch.randn(n, k, generator=generator) * 0.1
    w_NK[:: max(1, n // 5)] *= 30
    w_NK[n // 2] = 0
    w_NK[:, : k // 3] += 0.1
    return format.pack(format.quantize(w_NK))


def rows(t: int, k: int, seed: int = 1) -> Tensor:
    """Random activations with outliers; one row of zeros, one far too small, one not finite."""
    x_TK = torch.randn(t, k, generator=torch.Generator().manual_seed(seed))
    x_TK[:, :: max(1, k // 7)] *= 50
    if t > 4:
        x_TK[1], x_TK[2], x_TK[3, k // 2] = 0, x_TK[2] * 1e-35, torch.inf
    return x_TK


def same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.nan_to_num(1e30, 2e30, 3e30), b.nan_to_num(1e30, 2e30, 3e30))


@pytest.mark.parametrize("name", [name for name in FORMATS if not name.endswith("weight-only")])
def test_equals_the_definition(name: str) -> None:
    for t, n, k in SHAPES:
        w, x = weight(FORMATS[name], n, k), rows(t, k)
        b = torch.randn(n)
        assert same(panels.product(x, w, b), quantized_linear.reference(x, w, b)), (t, n, k)
        assert same(panels.product(x, w), quantized_linear.reference(x, w)), (t, n, k)


@pytest.mark.parametrize("scale", ["float16", "float32"])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("symmetric", [True, False])
def test_other_scales(bits: int, scale: str, symmetric: bool) -> None:
    for group in (0, 32):
        format = Format(bits=bits, group=group, symmetric=symmetric, scale=scale)
        w, x = weight(format, 40, 200), rows(9, 200)
        assert same(panels.product(x, w), quantized_linear.reference(x, w))


@pytest.mark.parametrize("name", [name for name in FORMATS if name.endswith("weight-only")])
def test_weight_only_is_the_float_product_of_the_widened_weights(name: str) -> None:
    for t, n, k in SHAPES:
        w, x, b = weight(FORMATS[name], n, k), rows(t, k), torch.randn(n)
        assert same(panels.product(x, w, b), linear(x, dequantize(unpack(w), w.group), b)), (t, n, k)


@pytest.mark.parametrize("name", ["int8", "int4", "int8-g64-asym", "int4-g128-asym", "int4-weight-only"])
@pytest.mark.parametrize("half", [48, 20])
def test_gates_and_activations(name: str, half: int) -> None:
    w, x, b = weight(FORMATS[name], 2 * half, 96), rows(20, 96), torch.randn(2 * half)
    plain = panels.product(x, w, b)
    assert same(panels.product(x, w, b, act="silu", gated=True), gated(plain, "silu"))
    assert same(panels.product(x, w, b, act="gelu_tanh"), activate(plain, "gelu_tanh"))


@pytest.mark.parametrize("name", list(FORMATS))
def test_rows_of_a_table(name: str) -> None:
    for n, k in ((100, 96), (17, 33), (1, 1)):
        table, ids = weight(FORMATS[name], n, k), torch.tensor([0, n - 1, n // 2, 0])
        assert same(panels.rows_of(ids, table), quantized_rows.reference(ids, table))


@pytest.mark.parametrize("name", ["int8", "int8-g128", "int4", "int4-g64-asym", "int8-weight-only", "int4-weight-only"])
def test_bits_do_not_depend_on_rows_or_threads(name: str) -> None:
    w, x = weight(FORMATS[name], 500, 384), torch.randn(700, 384)
    whole = panels.product(x, w)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            for at, count in ((0, 1), (1, 2), (3, 5), (10, 6), (20, 13), (40, 64), (0, 700)):
                assert same(panels.product(x[at : at + count], w), whole[at : at + count]), (threads, at, count)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("name", ["int8", "int4-channel", "int8-asym"])
def test_a_group_as_long_as_may_be(name: str) -> None:
    """The largest whole numbers there can be: every product at its limit, all of one sign."""
    k = 33_024
    format = FORMATS[name]
    w_NK = torch.ones(16, k)
    w_NK[:, ::2] = -1 if format.symmetric else 0
    x = torch.full((2, k), 3.0)
    x[0, ::2] = -3.0 if format.symmetric else 3.0
    x[1] = -x[0]
    w = format.pack(format.quantize(w_NK))
    assert same(panels.product(x, w), quantized_linear.reference(x, w))
    assert panels.product(x, w)[0, 0].abs() > k


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("symmetric", [True, False])
def test_rounding_into_panels_is_the_formats_own(bits: int, group: int, symmetric: bool) -> None:
    for scale, dtype in product(SCALES, (torch.float32, torch.bfloat16, torch.float16)):
        format = Format(bits=bits, group=group, symmetric=symmetric, scale=scale)
        for n, k in ((33, 200), (16, 8), (1, 1), (50, 515)):
            size = torch.randn(n, 1).exp() * (3e-6 if n == 33 else 0.1)  # the small are subnormal in fp16
            w_NK = (torch.randn(n, k) * size).to(dtype)
            w_NK[n // 2], w_NK[-1] = 0, w_NK[-1].abs()
            wanted, found = format.pack(format.quantize(w_NK)), format.empty(n, k)
            assert panels.round_into(w_NK, found)
            for a, b in zip(wanted[:3], found[:3], strict=True):
                assert a is b is None or torch.equal(a, b), (scale, dtype, n, k)


def test_rounding_of_experts_and_of_damage() -> None:
    format = FORMATS["int4-asym"]
    w_XNK = torch.randn(3, 20, 64, dtype=torch.bfloat16)
    wanted, found = format.pack(format.quantize(w_XNK)), QuantLinear(format.empty(3, 20, 64), format)
    found.round(w_XNK)
    assert torch.equal(found.codes, wanted.codes) and torch.equal(found.scales, wanted.scales)
    for wrong in (torch.nan, torch.inf):
        w_XNK[1, 7, 33] = wrong
        with pytest.raises(ConfigError, match="not finite"):
            found.round(w_XNK)


SCRIPT = """
import sys, torch
sys.path[:0] = sys.argv[2:]
from test_cpu_quantized import weight, rows
from twofold.kernels import native, panels
from twofold.quant.format import FORMATS
names = ("int8", "int8-g32-asym", "int4", "int4-g128", "int4-channel-asym", "int8-weight-only", "int4-asym-weight-only")
torch.save([panels.product(rows(23, 200), weight(FORMATS[name], 70, 200)) for name in names], sys.argv[1])
print(native.library().isa)
"""


def test_every_instruction_set_has_the_same_bits(tmp_path: Path) -> None:
    found = []
    for isa in (native.library().isa, "portable"):  # type: ignore[union-attr]
        file, here = tmp_path / isa, Path(__file__)
        command = [sys.executable, "-c", SCRIPT, str(file), str(here.parent), str(here.parents[2])]
        done = subprocess.run(command, env={**os.environ, "TWOFOLD_ISA": isa}, capture_output=True, text=True)
        assert done.stdout.strip() == isa, done.stderr
        found.append(torch.load(file, weights_only=True))
    assert all(same(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("isa", ["avx512", "amx"])
def test_what_this_machine_may_not_have_compiles(isa: str) -> None:
    compiler = find_compiler()
    assert compiler is not None
    if platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("instructions of x86")
    command = [compiler.path, *FLAGS, *native.flags(isa), "-Wno-maybe-uninitialized", "-S", "-o", "-"]
    for source in ("quantized.cpp", "round.cpp"):
        done = subprocess.run([*command, str(native.HERE / source)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[:2000]
        assert source == "round.cpp" or {"avx512": "vpdpbusd", "amx": "tdpbssd"}[isa] in done.stdout
