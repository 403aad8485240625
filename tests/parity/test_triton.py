"""The Triton kernels in Triton's interpreter: numbers and, as far as numpy can show them, bits."""

from __future__ import annotations

import pytest
import torch

from tests.parity import interpreter  # noqa: F401  (before any kernel)
from tests.parity import triton_cases as cases
from twofold.kernels.activation import ACTIVATIONS

CPU = "cpu"
FLOATS = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float16], ids=str)
def test_norms(dtype):
    cases.norms(CPU, dtype)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_norms_with_a_residual_have_the_bits_of_the_steps(dtype):
    cases.norms_with_residual(CPU, dtype)


def test_a_row_of_a_norm_does_not_see_its_neighbours():
    cases.a_norms_row_is_alone(CPU)


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_activations(act):
    cases.activations(CPU, act)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_rotary(dtype, interleaved):
    cases.rotations(CPU, dtype, interleaved)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_keys_are_written_to_their_slots(dtype):
    cases.written_keys(CPU, dtype)


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float16], ids=str)
def test_linear(dtype):
    cases.linears(CPU, dtype)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_a_row_of_a_linear_layer_has_one_bit_pattern(dtype):
    cases.a_linears_row_is_alone(CPU, dtype)


@pytest.mark.parametrize("name", ["int8", "int8-g32-asym", "int4", "int4-g64-asym-weight-only"])
def test_quantized_linear(name):
    cases.quantized_products(CPU, name, torch.float32)


def test_quantized_linear_of_bf16():
    cases.quantized_products(CPU, "int4-weight-only", torch.bfloat16)


def test_rows_are_rounded_as_the_definition_does():
    cases.rounded_rows(CPU)


def test_routing():
    cases.routes(CPU)


@pytest.mark.parametrize("name", [None, "int8"])
def test_experts(name):
    cases.mixtures(CPU, name)


@pytest.mark.parametrize("how", cases.HOWS.values(), ids=cases.HOWS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_attention_of_whole_sequences(how, dtype):
    cases.whole_sequences(CPU, how, dtype)


@pytest.mark.parametrize(("how", "size"), [("plain", 16), ("window", 128), ("all", 32), ("sparse", 32)])
def test_attention_over_the_cache_has_the_bits_of_whole_sequences(how, size):
    cases.cached_chunks(CPU, cases.HOWS[how], torch.float32, size)


@pytest.mark.parametrize(("how", "length"), [("plain", 1100), ("all", 600), ("sparse", 600), ("blocks", 1100)])
def test_a_split_decode_has_the_bits_of_a_walk(how, length):
    cases.split_decodes(CPU, cases.HOWS[how], torch.float32, length=length)


def test_a_decode_of_more_heads_than_a_tile_has_rows():
    cases.split_decodes(CPU, cases.HOWS["plain"], torch.bfloat16, heads=(71, 1), length=600)


@pytest.mark.parametrize("how", ["plain", "all"])
def test_attention_over_an_int8_cache(how):
    cases.int8_cache(CPU, cases.HOWS[how])


def test_attention_never_looks_at_absent_blocks():
    cases.absent_blocks(CPU)


@pytest.mark.parametrize("vocab", [5, 300, 5000])
def test_sampling_chooses_as_the_engine_does(vocab):
    cases.draws(CPU, vocab, 6)
