"""GPTQ's and AWQ's checkpoints: codes in 32-bit words, scales by group in rows, activations float.

    GPTQ (AutoGPTQ, GPTQModel)                           AWQ (AutoAWQ, "gemm")
      X.qweight  int32 [K·bits/32, N]  along inputs        X.qweight  int32 [K, N/8]  along outputs
      X.qzeros   int32 [G, N·bits/32]  along outputs       X.qzeros   int32 [G, N/8]
      X.scales   [G, N]                                    X.scales   [G, N]
      X.g_idx    int32 [K]  the group of each input        word: outputs 0 2 4 6 1 3 5 7 of eight, lowest first

GPTQ's zeros are one less than they mean in format v1 (`checkpoint_format` "gptq"), and as they are in "gptq_v2". With
desc_act, groups are of inputs in order of energy, which g_idx tells.

Shapes: N outputs, K inputs, G groups.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..core import CheckpointError
from .codes import Quantized
from .format import Format
from .names import READ_GROUPS
from .stored import FLOATS, Find, Part, in_order, lowered, order_of, refused, unpack_words

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""The output, of eight, that each place of a word has, lowest bits first."""
GPTQ_READS = "of 8 and 4 bits, by output or by groups of 16, 32, 64 or 128, in formats gptq and gptq_v2"
AWQ_READS = "of 4 bits with zeros, by output or by groups of 16, 32, 64 or 128, as version gemm"

_SAYS_NOTHING = {
    "gptq": """damp_percent static_groups true_sequential model_name_or_path model_file_base_name meta dataset tokenizer
        batch_size block_name_to_quantize module_name_preceding_first_block model_seqlen use_cuda_fp16 use_exllama
        exllama_config disable_exllama max_input_length cache_block_outputs modules_in_block_to_quantize backend
        quantizer damp_auto_increment mse act_group_aware lm_head version hyb_act inference_only pad_token_id
        modules_to_not_convert offload_to_disk""",
    "awq": """modules_to_not_convert do_fuse fuse_max_seq_len modules_to_fuse exllama_config backend model_name_or_path
        q_group_size w_bit export_compatible desc_act sym""",
}


@dataclass(frozen=True, slots=True)
class Gptq:
    """A weight as GPTQ's tools write it; `ahead`: zeros are one less than they mean (v1)."""

    format: Format
    ahead: bool

    def parts(self, name: str, n: int, k: int) -> dict[str, Part]:
        stem, each, groups = name.removesuffix("weight"), 32 // self.format.bits, self.format.groups(k)
        if n % each or k % each:
            raise CheckpointError(f"'{stem}qweight': {n} outputs by {k} inputs do not fill words of {each} codes")
        words = (torch.int32,)
        return {
            "codes": Part(f"{stem}qweight", (k // each, n), words),
            "zero": Part(f"{stem}qzeros", (groups, n // each), words),
            "scale": Part(f"{stem}scales", (groups, n), FLOATS),
            "g_idx": Part(f"{stem}g_idx", (k,), words, needed=self.format.ordered),
            "bias": Part(f"{stem}bias", (n,), FLOATS, needed=False),
        }

    def decode(self, parts: Mapping[str, Tensor], n: int, k: int) -> Quantized:
        bits, scale_NG = self.format.bits, parts["scale"].t().contiguous()
        codes_NK = lowered(unpack_words(parts["codes"].t(), bits), bits)
        one = 0x11111111 if bits == 4 else 0x01010101  # a word at a time: what was borrowed from a neighbour goes back
        zero_GN = lowered(unpack_words(parts["zero"] + one if self.ahead else parts["zero"], bits), bits)
        order_K = order_of(parts["g_idx"], self.format.group, "g_idx") if self.format.ordered else None
        codes_NK, zero_NG = in_order(codes_NK, order_K), zero_GN.t().contiguous()
        if self.format.symmetric:
            if bool((zero_NG != self.format.idle).any()):
                raise CheckpointError("config.json says 'sym': true, and there are zeros that are not the middle")
            return Quantized(codes_NK, scale_NG, None, self.format, order_K)
        return Quantized(codes_NK, scale_NG, zero_NG, self.format, order_K)

    def spare(self, part: str, tensor: Tensor) -> str:
        """Tools write biases of zeros where a layer has none, and groups in order where there is no other."""
        if part == "bias":
            return "this layer has no bias, and it is not zero" if bool(tensor.any()) else ""
        out_of_order = order_of(tensor, self.format.group, "g_idx") is not None
        return "config.json says 'desc_act': false, and groups are out of order" if out_of_order else ""


@dataclass(frozen=True, slots=True)
class Awq:
    """A weight as AutoAWQ writes it."""

    format: Format

    def parts(self, name: str, n: int, k: int) -> dict[str, Part]:
        stem, groups, words = name.removesuffix("weight"), self.format.groups(k), (torch.int32,)
        if n % 8:
            raise CheckpointError(f"'{stem}qweight': {n} outputs do not fill words of 8 codes")
        return {
            "codes": Part(f"{stem}qweight", (k, n // 8), words),
            "zero": Part(f"{stem}qzeros", (groups, n // 8), words),
            "scale": Part(f"{stem}scales", (groups, n), FLOATS),
        }

    def decode(self, parts: Mapping[str, Tensor], n: int, k: int) -> Quantized:
        codes_NK, zero_NG = (_along_outputs(parts[part]) for part in ("codes", "zero"))
        return Quantized(codes_NK, parts["scale"].t().contiguous(), zero_NG, self.format)

    def spare(self, part: str, tensor: Tensor) -> str:
        return ""


def _along_outputs(words: Tensor) -> Tensor:
    """[R, N/8] words to [N, R] codes."""
    places = unpack_words(words, 4).unflatten(-1, (-1, 8))
    codes_RN: Tensor = places[..., [AWQ_ORDER.index(output) for output in range(8)]].flatten(-2)
    return codes_RN.t().contiguous()


def gptq_config(told: Mapping[str, Any], modules: Iterable[str], find: Find) -> dict[str, Gptq]:
    """Each of these modules that a GPTQ checkpoint quantizes, by the tensors it has.

    Raises:
        CheckpointError: a setting that Twofold does not read, named.
    """
    style = told.get("checkpoint_format") or told.get("format") or "gptq"
    format = _format("GPTQ", told, GPTQ_READS, (8, 4), symmetric=bool(told.get("sym", True)))
    _check(
        told,
        "gptq",
        GPTQ_READS,
        checkpoint_format=("gptq", "gptq_v2", None),
        format=("gptq", "gptq_v2", None),
        is_marlin_format=(False, None),
        dynamic=(None, {}, False),
        desc_act=(True, False, None),
        sym=(True, False, None),
        pack_dtype=("int32", None),
    )
    found = {}
    for module in modules:
        if find(f"{module}.qweight") is None:
            continue
        g_idx_K = find(f"{module}.g_idx")
        ordered = bool(told.get("desc_act")) and g_idx_K is not None
        if ordered and g_idx_K is not None:
            ordered = order_of(g_idx_K, format.group, f"{module}.g_idx") is not None
        found[module] = Gptq(replace(format, ordered=ordered), style == "gptq")
    return found


def awq_config(told: Mapping[str, Any], modules: Iterable[str], find: Find) -> dict[str, Awq]:
    """The same for AWQ."""
    format = _format("AWQ", told, AWQ_READS, (4,), symmetric=False)
    _check(told, "awq", AWQ_READS, version=("gemm", "GEMM", None), format=("gemm", None), zero_point=(True, None))
    return {module: Awq(format) for module in modules if find(f"{module}.qweight") is not None}


def _format(method: str, told: Mapping[str, Any], reads: str, widths: tuple[int, ...], symmetric: bool) -> Format:
    bits, group = told.get("bits", told.get("w_bit")), told.get("group_size", told.get("q_group_size"))
    if bits not in widths:
        raise refused(method, "bits", bits, reads)
    if group != -1 and (group not in READ_GROUPS or not group):
        raise refused(method, "group_size", group, reads)
    return Format(
        bits=bits, group=0 if group == -1 else group, symmetric=symmetric, activations="float", scale="float16"
    )


def _check(told: Mapping[str, Any], method: str, reads: str, **allowed: tuple[Any, ...]) -> None:
    """Refuse keys with other values than these, and keys that nobody knows."""
    known = {"quant_method", "bits", "group_size", *_SAYS_NOTHING[method].split()}
    for key, value in told.items():
        if (key in allowed and value not in allowed[key]) or (key not in allowed and key not in known):
            raise refused(method.upper(), key, value, reads)
