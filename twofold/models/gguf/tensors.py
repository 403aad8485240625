"""A GGUF file's tensors by the names and in the layouts of the checkpoint that it was made from.

    blk.3.attn_q.weight          model.layers.3.self_attn.q_proj.weight
    blk.3.ffn_gate_exps.weight   model.layers.3.mlp.experts.0.gate_proj.weight, and so on for each expert

llama.cpp turns neighbours where Hugging Face turns halves, so rows of q and k of its "llama" models lie interleaved;
they are put back, as floats or as rows of blocks. Gemma's norms are kept as 1 + w there, and as w here.
"""

from __future__ import annotations

import math
import mmap
import os
import re
import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ...core.errors import CheckpointError
from ...quant.blocks import KINDS
from ..shards import Entry, Shard
from .file import GgufFile, Lying

LAYER = "model.layers.{i}."
TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
IN_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_exps": "mlp.experts.{e}.gate_proj",
    "ffn_up_exps": "mlp.experts.{e}.up_proj",
    "ffn_down_exps": "mlp.experts.{e}.down_proj",
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
    "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj",
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
}
SANDWICH = {
    "ffn_norm": "pre_feedforward_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
MIXTRAL = {
    "ffn_gate_inp": "block_sparse_moe.gate",
    "ffn_gate_exps": "block_sparse_moe.experts.{e}.w1",
    "ffn_up_exps": "block_sparse_moe.experts.{e}.w3",
    "ffn_down_exps": "block_sparse_moe.experts.{e}.w2",
}
ROPE = "rope_freqs.weight"
LINK = "model.gguf"
"""What the file is called in a folder that stands for it."""
FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def checkpoint_name(name: str, kind: str) -> str:
    """The checkpoint's name of a tensor of a `kind` of model; its own when there is none, so that it is left over.

    The name of an expert keeps "{e}".
    """
    found = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
    if not found:
        stem, _, last = name.rpartition(".")
        return f"{TOP[stem]}.{last}" if stem in TOP else name
    layer, part, last = found.groups()
    table = IN_LAYER | (SANDWICH if kind in ("gemma2", "gemma3") else MIXTRAL if kind == "llama" else {})
    return f"{LAYER.format(i=layer)}{table[part]}.{last}" if part in table else name


class GgufShard(Shard):
    """The file as a Shard is read: `entries` by the checkpoint's names; quantized tensors are rows of bytes.

    `kinds` says which kind of blocks each quantized one is of.

    Raises:
        CheckpointError: the file cannot be read.
    """

    def __init__(self, file: GgufFile) -> None:
        self.path = file.path
        self.kinds: dict[str, str] = {}
        self.entries: dict[str, Entry] = {}
        self._turned: dict[str, int] = {}
        self._raised: set[str] = set()
        try:
            self._file = os.open(file.path, os.O_RDONLY)
            weakref.finalize(self, os.close, self._file)
            self._map = mmap.mmap(self._file, 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise CheckpointError(f"{file.path} cannot be read: {error.strerror or error}") from None
        kind = str(file.meta.get("general.architecture"))
        heads = _heads(file.meta, kind)
        for theirs, lying in file.tensors.items():
            if theirs == ROPE:
                continue
            name = checkpoint_name(theirs, kind)
            self._add(name, lying)
            if part := re.search(r"\.attn_([qk])\.", theirs) if kind == "llama" else None:
                self._turned[name] = heads[part[1]]
            if kind.startswith("gemma") and name.endswith("norm.weight"):
                self._raised.add(name)

    def _add(self, name: str, lying: Lying) -> None:
        shape = lying.shape
        if name.endswith("shared_expert_gate.weight") and len(shape) == 1:
            shape = (1, *shape)
        if "{e}" in name:
            count, each = shape[0], (lying.end - lying.begin) // max(1, shape[0])
            for expert in range(count):
                begin = lying.begin + expert * each
                self._add(
                    name.replace("{e}", str(expert)),
                    Lying(kind=lying.kind, shape=shape[1:], begin=begin, end=begin + each),
                )
            return
        if lying.kind in FLOATS:
            dtype = FLOATS[lying.kind]
        else:
            kind, dtype = KINDS[lying.kind], torch.uint8
            self.kinds[name] = lying.kind
            shape = (*shape[:-1], shape[-1] // kind.inputs * kind.bytes)
        self.entries[name] = Entry(dtype=dtype, shape=shape, begin=lying.begin, end=lying.end)

    def tensor(self, name: str) -> Tensor:
        x = super().tensor(name)
        if name in self._turned:
            pairs = x.unflatten(0, (self._turned[name], -1, 2))
            x = pairs.transpose(1, 2).flatten(0, 2)
        return x - 1.0 if name in self._raised else x

    def read_into(self, places: Mapping[str, Tensor]) -> None:
        changed = [name for name in places if name in self._turned or name in self._raised]
        for name in changed:
            places[name].copy_(self.tensor(name))
        super().read_into({name: place for name, place in places.items() if name not in changed})


def _heads(meta: Mapping[str, Any], kind: str) -> dict[str, int]:
    heads = meta.get(f"{kind}.attention.head_count")
    return {"q": heads or 1, "k": meta.get(f"{kind}.attention.head_count_kv") or heads or 1}


def rope_factors(file: GgufFile) -> list[float] | None:
    """The numbers that a rope's frequencies are divided by, where the file holds them."""
    lying = file.tensors.get(ROPE)
    if lying is None:
        return None
    if lying.kind != "F32":
        raise CheckpointError(f"{file.path}: '{ROPE}' is {lying.kind}, not F32")
    with file.path.open("rb") as opened:
        opened.seek(lying.begin)
        raw = bytearray(opened.read(lying.end - lying.begin))
    return [float(x) for x in torch.frombuffer(raw, dtype=torch.float32, count=math.prod(lying.shape))]
