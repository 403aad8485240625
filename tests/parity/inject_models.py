"""Tiny random transformers models of many families, for what is done to a model object rather than to a checkpoint."""

from __future__ import annotations

from typing import Any

import torch
import transformers

BASE: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
WINDOWS = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {"head_dim": 16}),
    "mistral": ("MistralConfig", {"sliding_window": 8}),
    "gemma2": ("Gemma2Config", {"head_dim": 16, **WINDOWS}),
    "gemma3": ("Gemma3TextConfig", {"head_dim": 16, **WINDOWS}),
    "phi3": ("Phi3Config", {}),
    "gpt2": ("GPT2Config", {"n_embd": 64, "n_layer": 2, "n_head": 4}),
    "neox": ("GPTNeoXConfig", {}),
    "olmo2": ("Olmo2Config", {}),
    "cohere": ("CohereConfig", {}),
    "mixtral": ("MixtralConfig", {"num_local_experts": 4}),
    "gpt_oss": ("GptOssConfig", {"head_dim": 16, "num_local_experts": 4, **WINDOWS}),
    "opt": ("OPTConfig", {"ffn_dim": 96, "word_embed_proj_dim": 64}),
    "bert": ("BertConfig", {}),
}


def make(name: str, **changes: Any) -> torch.nn.Module:
    """A model of one family, the same at each call."""
    kind, extra = FAMILIES[name]
    torch.manual_seed(0)
    config = getattr(transformers, kind)(**{**BASE, **extra, **changes})
    auto = transformers.AutoModel if name == "bert" else transformers.AutoModelForCausalLM
    model: torch.nn.Module = auto.from_config(config).eval()
    return model


def texts(padding: str = "left") -> tuple[torch.Tensor, torch.Tensor]:
    """Two texts of 40 ids, five of the first being padding, and the mask that says so."""
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 128, (2, 40), generator=draw)
    mask = torch.ones_like(ids)
    mask[0, slice(0, 5) if padding == "left" else slice(35, 40)] = 0
    return ids, mask
