"""Tiny GGUF files, written by gguf's own writer from a decoder's weights, in llama.cpp's names and layouts."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from twofold.models import Decoder, save, spec_from

HIDDEN, HEADS, KV_HEADS, LAYERS, WIDTH, VOCAB = 256, 4, 2, 2, 512, 48
BASE: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "vocab_size": VOCAB,
    "intermediate_size": WIDTH,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10_000.0,
}
DIM = HIDDEN // HEADS
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": BASE | {"architectures": ["LlamaForCausalLM"]},
    "qwen2": BASE | {"architectures": ["Qwen2ForCausalLM"], "tie_word_embeddings": True},
    "qwen3": BASE | {"architectures": ["Qwen3ForCausalLM"], "head_dim": DIM, "tie_word_embeddings": True},
    "gemma": BASE | {"architectures": ["GemmaForCausalLM"], "head_dim": DIM},
    "gemma2": BASE
    | {"architectures": ["Gemma2ForCausalLM"], "head_dim": DIM, "query_pre_attn_scalar": DIM, "sliding_window": 16},
    "gemma3": BASE
    | {"architectures": ["Gemma3ForCausalLM"], "head_dim": DIM, "query_pre_attn_scalar": DIM, "sliding_window": 16},
    "qwen3moe": BASE
    | {
        "architectures": ["Qwen3MoeForCausalLM"],
        "head_dim": DIM,
        "num_experts": 3,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 256,
        "norm_topk_prob": True,
    },
}
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
FOUR_NORMS = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
EXPERTS = {"gate_proj": "ffn_gate_exps", "up_proj": "ffn_up_exps", "down_proj": "ffn_down_exps"}
HALVES = {
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
    "IQ4_NL": (0,),
}
"""Where a block of a kind that gguf reads and does not write has numbers of fp16."""


def floats(arch: str, path: Path) -> dict[str, Tensor]:
    """A random model's weights by the checkpoint's names."""
    decoder = Decoder(spec_from(CONFIGS[arch]))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.normal_(0.0, 0.1, generator=generator)
    save(decoder, path, config=CONFIGS[arch])
    return load_file(path / "model.safetensors")


def quantized(w: np.ndarray, kind: str, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of blocks of a kind, and what they mean: w rounded where gguf can, else any blocks at all."""
    number = gguf.GGMLQuantizationType[kind]
    if kind not in HALVES:
        raw = gguf.quants.quantize(w, number)
    else:
        inputs, size = gguf.GGML_QUANT_SIZES[number]
        rng = np.random.default_rng(seed)
        raw = rng.integers(0, 256, (*w.shape[:-1], w.shape[-1] // inputs, size), dtype=np.uint8)
        for at in HALVES[kind]:
            scale = rng.normal(0, 2e-4, raw.shape[:-1]).astype(np.float16)
            raw[..., at : at + 2] = scale[..., None].view(np.uint8)
        raw = raw.reshape(*w.shape[:-1], -1)
    return raw, gguf.quants.dequantize(raw, number)


def interleaved(w: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q or k as llama.cpp's llama models have them (its converter's `permute`)."""
    return w.reshape(heads, 2, w.shape[0] // heads // 2, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)


def halved(w: np.ndarray, heads: int) -> np.ndarray:
    """The way back."""
    return w.reshape(heads, w.shape[0] // heads // 2, 2, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)


def write(
    arch: str, path: Path, kinds: dict[str, str] | str, tokenizer: dict[str, Any] | None = None
) -> dict[str, Tensor]:
    """A GGUF file at `path`; returns what each weight means by the checkpoint's name.

    `kinds` is the kind of every matrix, or of those whose last part of the name is told; others are F16.
    """
    weights = floats(arch, path.parent / "floats")
    writer = gguf.GGUFWriter(path, arch)
    metadata(writer, arch)
    for key, value in (tokenizer or vocabulary()).items():
        add(writer, key, value)
    meant: dict[str, Tensor] = {}
    table = NAMES | (FOUR_NORMS if arch in ("gemma2", "gemma3") else {})
    stacks: dict[str, list[tuple[str, Tensor]]] = {}
    for name, tensor in weights.items():
        if expert := re.fullmatch(r"model\.layers\.(\d+)\.mlp\.experts\.\d+\.(\w+)\.weight", name):
            stacks.setdefault(f"blk.{expert[1]}.{EXPERTS[expert[2]]}.weight", []).append((name, tensor))
            continue
        stem, _, last = name.rpartition(".")
        if inside := re.match(r"model\.layers\.(\d+)\.(.*)", stem):
            theirs = f"blk.{inside[1]}.{table[inside[2]]}.{last}"
        else:
            theirs = f"{table[stem]}.{last}"
        part = theirs.split(".")[-2]
        meant[name] = put(writer, arch, theirs, part, tensor, kinds)
    for theirs, members in stacks.items():
        whole = torch.stack([tensor for _, tensor in members])
        found = put(writer, arch, theirs, theirs.split(".")[-2], whole, kinds)
        meant |= {name: found[i] for i, (name, _) in enumerate(members)}
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return meant


def put(
    writer: gguf.GGUFWriter, arch: str, theirs: str, part: str, tensor: Tensor, kinds: dict[str, str] | str
) -> Tensor:
    """One tensor; what it means in the checkpoint's layout."""
    w = tensor.float().numpy()
    heads = {"attn_q": HEADS, "attn_k": KV_HEADS}.get(part) if arch == "llama" else None
    raised = arch.startswith("gemma") and part.endswith("norm")
    w = interleaved(w, heads) if heads else w + 1.0 if raised else w
    kind = kinds if isinstance(kinds, str) else kinds.get(part, "F16")
    if w.ndim == 1 or part == "ffn_gate_inp":
        kind = "F32"
    if kind in ("F32", "F16"):
        means = w.astype(np.float32 if kind == "F32" else np.float16)
        writer.add_tensor(theirs, means)
        means = means.astype(np.float32)
    elif kind == "BF16":
        half = torch.from_numpy(w).bfloat16()
        writer.add_tensor(
            theirs, half.view(torch.int16).numpy().view(np.uint8), raw_dtype=gguf.GGMLQuantizationType.BF16
        )
        means = half.float().numpy()
    else:
        raw, means = quantized(w, kind, seed=sum(theirs.encode()))
        writer.add_tensor(theirs, raw, raw_dtype=gguf.GGMLQuantizationType[kind])
    means = halved(means, heads) if heads else means - np.float32(1.0) if raised else means
    return torch.from_numpy(np.ascontiguousarray(means))


def metadata(writer: gguf.GGUFWriter, arch: str) -> None:
    config = CONFIGS[arch]
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(WIDTH)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_rope_dimension_count(DIM)
    if arch == "llama":
        writer.add_vocab_size(VOCAB)
    if "head_dim" in config:
        writer.add_key_length(DIM)
        writer.add_value_length(DIM)
    if "sliding_window" in config:
        writer.add_sliding_window(config["sliding_window"])
    if arch == "gemma2":
        writer.add_attn_logit_softcapping(50.0)
        writer.add_final_logit_softcapping(30.0)
    if "num_experts" in config:
        writer.add_expert_count(config["num_experts"])
        writer.add_expert_used_count(config["num_experts_per_tok"])
        writer.add_expert_feed_forward_length(config["moe_intermediate_size"])


def vocabulary() -> dict[str, Any]:
    """A vocabulary of letters alone, as the bytes of `gpt2` have them."""
    letters = [chr(place) for place in range(ord("a"), ord("z") + 1)] + ["Ġ", "Ċ"]
    tokens = [*letters, "he", "ll", "hell", "hello", "Ġw", *(f"<{i}>" for i in range(VOCAB - 33))]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.merges": ["h e", "l l", "he ll", "hell o", "Ġ w"],
        "tokenizer.ggml.token_type": [1] * 33 + [3] * (VOCAB - 33),
        "tokenizer.ggml.eos_token_id": 33,
        "tokenizer.chat_template": "{% for m in messages %}{{ m.content }}{% endfor %}",
    }


def add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)
