"""The Triton kernels on the device: what `tests/parity/test_triton.py` shows by numpy, here by tensor cores."""

from __future__ import annotations

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]

if torch.cuda.is_available():
    from tests.parity import triton_cases as cases

GPU = "cuda"
FLOATS = [torch.float32, torch.bfloat16, torch.float16]
ACTS = ("silu", "gelu", "gelu_tanh", "gelu_quick", "relu", "relu2")
HOWS = ("plain", "window", "all", "sparse", "blocks")
FORMATS = ("int8", "int8-asym", "int8-g32-asym", "int8-g128", "int4", "int4-asym", "int4-g64", "int4-g128-asym")


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_norms(dtype):
    cases.norms(GPU, dtype)
    cases.norms_with_residual(GPU, dtype)
    cases.a_norms_row_is_alone(GPU)


@pytest.mark.parametrize("act", ACTS)
def test_activations(act):
    cases.activations(GPU, act)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_rotary_and_the_cache(dtype, interleaved):
    cases.rotations(GPU, dtype, interleaved)
    cases.written_keys(GPU, dtype)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_linear(dtype):
    cases.linears(GPU, dtype, rows=(0, 1, 5, 70, 300))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(("inner", "outputs"), [(100, 40), (1024, 3072), (4096, 4096), (3072, 1000)])
def test_a_row_of_a_linear_layer_has_one_bit_pattern(dtype, inner, outputs):
    cases.a_linears_row_is_alone(GPU, dtype, inner, outputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("weights_only", ["", "-weight-only"])
@pytest.mark.parametrize("name", FORMATS)
def test_quantized_linear(name, weights_only, dtype):
    cases.quantized_products(GPU, name + weights_only, dtype)


def test_rows_are_rounded_as_the_definition_does():
    cases.rounded_rows(GPU)


@pytest.mark.parametrize("name", [None, "int8", "int4-weight-only"])
def test_experts(name):
    cases.routes(GPU)
    cases.mixtures(GPU, name)


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_attention_of_whole_sequences(how, dtype):
    cases.whole_sequences(GPU, cases.HOWS[how], dtype, lengths=(700, 17, 0, 1, 512, 513))


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("size", [16, 128])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("chunk", [1, 7, 64, 300])
def test_attention_over_the_cache_has_the_bits_of_whole_sequences(how, dtype, size, chunk):
    cases.cached_chunks(GPU, cases.HOWS[how], dtype, size, length=150 if chunk == 1 else 1300, chunk=chunk)


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_a_split_decode_has_the_bits_of_a_walk(how, dtype):
    cases.split_decodes(GPU, cases.HOWS[how], dtype, length=2100 - 60)


def test_attention_never_looks_at_absent_blocks():
    cases.absent_blocks(GPU)


def test_a_decode_of_more_heads_than_a_tile_has_rows():
    cases.split_decodes(GPU, cases.HOWS["plain"], torch.bfloat16, heads=(71, 1), length=1500)


@pytest.mark.parametrize("how", HOWS)
def test_attention_over_an_int8_cache(how):
    cases.int8_cache(GPU, cases.HOWS[how])


@pytest.mark.parametrize("vocab", [5, 300, 5000, 151_936])
def test_sampling_chooses_as_the_definition_does(vocab):
    cases.draws(GPU, vocab, 8)
