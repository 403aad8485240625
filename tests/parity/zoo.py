"""Tiny random checkpoints of every architecture, made by transformers: odd sizes, every variant that changes the maths.

Norm weights, biases and routers are random too, so that a swapped or forgotten tensor shows in the logits.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One row of the parity table: a transformers config, and a prompt long enough to reach what it varies."""

    architecture: str
    config: dict[str, Any] = field(default_factory=dict)
    prompt: int = 40
    max_len: int | None = None


LLAMA = {
    "vocab_size": 101,
    "hidden_size": 40,
    "intermediate_size": 53,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
MOE = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 19}
ERNIE = {"moe_num_experts": 5, "moe_k": 2, "moe_intermediate_size": 19, "moe_num_shared_experts": 2}
GPT = {"vocab_size": 101, "n_embd": 40, "n_layer": 3, "n_head": 4, "n_positions": 128}
NEOX = {
    "vocab_size": 103,
    "hidden_size": 48,
    "intermediate_size": 75,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "max_position_embeddings": 128,
}
OPT = {
    "vocab_size": 97,
    "hidden_size": 36,
    "ffn_dim": 59,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "max_position_embeddings": 96,
}
BLOOM = {"vocab_size": 101, "hidden_size": 42, "n_layer": 2, "n_head": 3}
FALCON = {
    "vocab_size": 101,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
}
GEMMA = LLAMA | {"head_dim": 14, "query_pre_attn_scalar": 24}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.1, 1.3, 1.7, 2.0],
    "long_factor": [1.0, 2.0, 3.5, 6.0, 9.0],
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}


def _v(
    architecture: str, base: dict[str, Any], prompt: int = 40, max_len: int | None = None, **changes: Any
) -> Variant:
    return Variant(architecture=architecture, config=base | changes, prompt=prompt, max_len=max_len)


def _rope(**parameters: Any) -> dict[str, Any]:
    return {"rope_theta": 10000.0} | parameters


ZOO: dict[str, Variant] = {
    "llama": _v("LlamaForCausalLM", LLAMA, prompt=150),
    "llama-biases-tied": _v(
        "LlamaForCausalLM", LLAMA, attention_bias=True, mlp_bias=True, head_dim=14, tie_word_embeddings=True
    ),
    "llama-mqa": _v("LlamaForCausalLM", LLAMA, num_key_value_heads=1, hidden_act="gelu_pytorch_tanh"),
    "llama-linear": _v("LlamaForCausalLM", LLAMA, rope_parameters=_rope(rope_type="linear", factor=3.0)),
    "llama-dynamic": _v(
        "LlamaForCausalLM",
        LLAMA,
        max_position_embeddings=50,
        rope_parameters=_rope(rope_type="dynamic", factor=2.0),
    ),
    "llama-llama3": _v(
        "LlamaForCausalLM",
        LLAMA,
        prompt=140,
        rope_parameters=_rope(
            rope_type="llama3",
            rope_theta=500.0,
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=64,
        ),
    ),
    "llama-yarn": _v("LlamaForCausalLM", LLAMA, prompt=140, rope_parameters=YARN),
    "llama-yarn-mscale": _v(
        "LlamaForCausalLM",
        LLAMA,
        rope_parameters=YARN | {"mscale": 1.2, "mscale_all_dim": 0.7, "beta_fast": 20.0, "truncate": False},
    ),
    "llama-yarn-factor": _v(
        "LlamaForCausalLM", LLAMA, rope_parameters=YARN | {"attention_factor": 1.3, "beta_slow": 2}
    ),
    "mistral": _v("MistralForCausalLM", LLAMA, sliding_window=None, head_dim=16),
    "mistral-window": _v("MistralForCausalLM", LLAMA, prompt=150, sliding_window=7),
    "mixtral": _v("MixtralForCausalLM", LLAMA, num_local_experts=5, num_experts_per_tok=2),
    "mixtral-window": _v("MixtralForCausalLM", LLAMA, num_local_experts=3, num_experts_per_tok=1, sliding_window=9),
    "qwen2": _v("Qwen2ForCausalLM", LLAMA, tie_word_embeddings=True),
    "qwen2-window": _v(
        "Qwen2ForCausalLM", LLAMA, num_hidden_layers=3, use_sliding_window=True, sliding_window=11, max_window_layers=1
    ),
    "qwen2-yarn": _v("Qwen2ForCausalLM", LLAMA, prompt=90, rope_parameters=YARN),
    "qwen2-moe": _v("Qwen2MoeForCausalLM", LLAMA, **MOE, shared_expert_intermediate_size=27),
    "qwen2-moe-sparse-step": _v(
        "Qwen2MoeForCausalLM",
        LLAMA,
        **MOE,
        num_hidden_layers=4,
        shared_expert_intermediate_size=27,
        decoder_sparse_step=2,
        mlp_only_layers=[3],
        norm_topk_prob=True,
        use_sliding_window=True,
        sliding_window=6,
        max_window_layers=3,
    ),
    "qwen2-moe-no-bias": _v("Qwen2MoeForCausalLM", LLAMA, **MOE, shared_expert_intermediate_size=27, qkv_bias=False),
    "qwen3": _v("Qwen3ForCausalLM", LLAMA, head_dim=14),
    "qwen3-bias-window": _v(
        "Qwen3ForCausalLM",
        LLAMA,
        head_dim=14,
        attention_bias=True,
        use_sliding_window=True,
        sliding_window=8,
        max_window_layers=1,
    ),
    "qwen3-moe": _v("Qwen3MoeForCausalLM", LLAMA, **MOE, head_dim=14, norm_topk_prob=True),
    "qwen3-moe-mixed": _v(
        "Qwen3MoeForCausalLM",
        LLAMA,
        **MOE,
        head_dim=14,
        num_hidden_layers=3,
        mlp_only_layers=[1],
        use_sliding_window=True,
        sliding_window=9,
    ),
    "ernie-moe": _v("Ernie4_5_MoeForCausalLM", LLAMA, **ERNIE),
    "ernie-moe-interval": _v(
        "Ernie4_5_MoeForCausalLM",
        LLAMA,
        **ERNIE | {"moe_num_shared_experts": 0, "moe_k": 1},
        num_hidden_layers=4,
        moe_layer_interval=2,
        moe_layer_start_index=0,
        tie_word_embeddings=False,
    ),
    "gemma": _v("GemmaForCausalLM", LLAMA, head_dim=14, num_key_value_heads=1),
    "gemma2": _v("Gemma2ForCausalLM", GEMMA, prompt=150, sliding_window=9, num_hidden_layers=3),
    "gemma2-caps": _v(
        "Gemma2ForCausalLM",
        GEMMA,
        sliding_window=9,
        attn_logit_softcapping=2.0,
        final_logit_softcapping=3.0,
        attention_bias=True,
    ),
    "gemma3": _v("Gemma3ForCausalLM", GEMMA, prompt=150, num_hidden_layers=7, sliding_window=9),
    "gemma3-linear": _v(
        "Gemma3ForCausalLM",
        GEMMA,
        num_hidden_layers=3,
        sliding_window=9,
        layer_types=["full_attention", "sliding_attention", "full_attention"],
        final_logit_softcapping=4.0,
        rope_parameters={
            "full_attention": {"rope_type": "linear", "rope_theta": 1e5, "factor": 8.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 2e3},
        },
    ),
    "phi": _v("PhiForCausalLM", LLAMA, rope_parameters=_rope(partial_rotary_factor=0.4)),
    "phi-qk-norm": _v("PhiForCausalLM", LLAMA, qk_layernorm=True, rope_parameters=_rope(partial_rotary_factor=0.6)),
    "phi3": _v("Phi3ForCausalLM", LLAMA, sliding_window=13, original_max_position_embeddings=256),
    "phi3-longrope-long": _v(
        "Phi3ForCausalLM", LLAMA, prompt=70, original_max_position_embeddings=64, rope_parameters=LONGROPE
    ),
    "phi3-longrope-short": _v(
        "Phi3ForCausalLM",
        LLAMA,
        prompt=30,
        max_len=64,
        original_max_position_embeddings=64,
        rope_parameters=LONGROPE,
    ),
    "phi3-longrope-partial": _v(
        "Phi3ForCausalLM",
        LLAMA,
        prompt=70,
        original_max_position_embeddings=64,
        hidden_size=56,
        rope_parameters=LONGROPE | {"partial_rotary_factor": 0.75},
    ),
    "gpt2": _v("GPT2LMHeadModel", GPT),
    "gpt2-inner": _v(
        "GPT2LMHeadModel",
        GPT,
        n_inner=61,
        scale_attn_by_inverse_layer_idx=True,
        activation_function="gelu",
        tie_word_embeddings=False,
    ),
    "gpt2-unscaled": _v("GPT2LMHeadModel", GPT, scale_attn_weights=False),
    "gpt-neox": _v("GPTNeoXForCausalLM", NEOX),
    "gpt-neox-sequential": _v(
        "GPTNeoXForCausalLM",
        NEOX,
        use_parallel_residual=False,
        attention_bias=False,
        rope_parameters=_rope(rope_theta=500.0, partial_rotary_factor=1.0),
    ),
    "gptj": _v("GPTJForCausalLM", GPT, rotary_dim=6),
    "gptj-inner": _v("GPTJForCausalLM", GPT, rotary_dim=10, n_inner=61),
    "opt": _v("OPTForCausalLM", OPT),
    "opt-350m": _v("OPTForCausalLM", OPT, do_layer_norm_before=False, word_embed_proj_dim=20),
    "opt-no-affine": _v(
        "OPTForCausalLM",
        OPT,
        enable_bias=False,
        layer_norm_elementwise_affine=False,
        activation_function="gelu",
        tie_word_embeddings=False,
    ),
    "opt-no-final-norm": _v("OPTForCausalLM", OPT, _remove_final_layer_norm=True),
    "bloom": _v("BloomForCausalLM", BLOOM, prompt=140),
    "bloom-4-heads": _v("BloomForCausalLM", BLOOM, hidden_size=44, n_head=4),
    "falcon-7b": _v("FalconForCausalLM", FALCON),
    "falcon-40b": _v("FalconForCausalLM", FALCON, new_decoder_architecture=True, num_kv_heads=2, bias=True),
    "falcon-11b": _v(
        "FalconForCausalLM", FALCON, new_decoder_architecture=True, num_kv_heads=2, num_ln_in_parallel_attn=1
    ),
    "falcon-rw": _v(
        "FalconForCausalLM",
        FALCON,
        alibi=True,
        multi_query=False,
        parallel_attn=False,
        bias=True,
        ffn_hidden_size=77,
    ),
    "falcon-heads": _v("FalconForCausalLM", FALCON, multi_query=False, tie_word_embeddings=False),
    "stablelm": _v("StableLmForCausalLM", LLAMA, use_qkv_bias=True, rope_parameters=_rope(partial_rotary_factor=0.4)),
    "stablelm-12b": _v(
        "StableLmForCausalLM",
        LLAMA,
        use_parallel_residual=True,
        qk_layernorm=True,
        rope_parameters=_rope(partial_rotary_factor=0.8),
    ),
    "starcoder2": _v("Starcoder2ForCausalLM", LLAMA, prompt=150, sliding_window=17),
    "starcoder2-no-bias": _v("Starcoder2ForCausalLM", LLAMA, use_bias=False, tie_word_embeddings=False),
    "olmo": _v("OlmoForCausalLM", LLAMA, clip_qkv=0.5),
    "olmo-no-clip": _v("OlmoForCausalLM", LLAMA, attention_bias=True),
    "olmo2": _v("Olmo2ForCausalLM", LLAMA),
    "cohere": _v("CohereForCausalLM", LLAMA, logit_scale=0.3),
    "cohere-qk-norm": _v("CohereForCausalLM", LLAMA, use_qk_norm=True, attention_bias=True, tie_word_embeddings=False),
    "granite": _v(
        "GraniteForCausalLM",
        LLAMA,
        embedding_multiplier=3.0,
        attention_multiplier=0.11,
        residual_multiplier=0.4,
        logits_scaling=1.7,
        attention_bias=True,
    ),
}

ARCHITECTURES = sorted({variant.architecture for variant in ZOO.values()})


def build(variant: Variant) -> transformers.PreTrainedModel:
    """The random model of a variant; no end-of-sequence token, so that `generate` runs to its limit."""
    cls = getattr(transformers, variant.architecture)
    config = cls.config_class(**variant.config, bos_token_id=None, eos_token_id=None, pad_token_id=0)
    model = cls(config).eval()
    model.set_experts_implementation("eager")
    generator = torch.Generator().manual_seed(sum(map(ord, variant.architecture)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            is_norm = "norm" in name or ".ln_" in name
            if parameter.dim() == 1 or is_norm:
                parameter.copy_(0.3 * noise + (1.0 if is_norm and name.endswith("weight") else 0.0))
            else:
                parameter.copy_(0.2 * noise)
    return model


def prompt_of(variant: Variant) -> list[int]:
    """Token ids, the same at each call."""
    generator = torch.Generator().manual_seed(variant.prompt)
    return torch.randint(1, variant.config["vocab_size"], (variant.prompt,), generator=generator).tolist()


def save(variant: Variant, path: Path) -> transformers.PreTrainedModel:
    """Build a variant, write it as transformers does, and give it back."""
    model = build(variant)
    model.save_pretrained(path)
    return model
