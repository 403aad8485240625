"""config.json as well-known checkpoints carry it, old spellings included: each reads without a word left over."""

from __future__ import annotations

from typing import Any

import pytest

from twofold.models import spec_from
from twofold.models.spec import (
    Alibi,
    Attention,
    DynamicNtk,
    Gated,
    Learned,
    Llama3Scaling,
    LongRope,
    Mixture,
    Parallel,
    PostResidual,
    Rope,
    Sandwich,
)

COMMON: dict[str, Any] = {
    "bos_token_id": 1,
    "eos_token_id": [2, 3],
    "initializer_range": 0.02,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.40.0",
    "use_cache": True,
}
ROPE_L3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
GPT_SUMMARY = {
    "summary_activation": None,
    "summary_first_dropout": 0.1,
    "summary_proj_to_labels": True,
    "summary_type": "cls_index",
    "summary_use_proj": True,
    "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
}


def sizes(hidden: int, layers: int, heads: int, kv: int | None, width: int, vocab: int) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": width,
        "vocab_size": vocab,
    } | ({"num_key_value_heads": kv} if kv else {})


HUB: dict[str, dict[str, Any]] = {
    "llama-2-7b": sizes(4096, 32, 32, 32, 11008, 32000)
    | {
        "architectures": ["LlamaForCausalLM"],
        "_name_or_path": "x",
        "hidden_act": "silu",
        "max_position_embeddings": 4096,
        "model_type": "llama",
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-5,
        "rope_scaling": None,
        "tie_word_embeddings": False,
    },
    "llama-3.1-8b": sizes(4096, 32, 32, 8, 14336, 128256)
    | {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "max_position_embeddings": 131072,
        "mlp_bias": False,
        "rms_norm_eps": 1e-5,
        "rope_scaling": ROPE_L3,
        "rope_theta": 500000.0,
    },
    "llama-dynamic-old-spelling": sizes(4096, 32, 32, None, 11008, 32000)
    | {
        "architectures": ["LlamaForCausalLM"],
        "max_position_embeddings": 4096,
        "rope_scaling": {"type": "dynamic", "factor": 2.0},
    },
    "mistral-7b-v0.1": sizes(4096, 32, 32, 8, 14336, 32000)
    | {
        "architectures": ["MistralForCausalLM"],
        "hidden_act": "silu",
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "sliding_window": 4096,
    },
    "mixtral-8x7b": sizes(4096, 32, 32, 8, 14336, 32000)
    | {
        "architectures": ["MixtralForCausalLM"],
        "max_position_embeddings": 32768,
        "num_experts_per_tok": 2,
        "num_local_experts": 8,
        "output_router_logits": False,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1000000.0,
        "router_aux_loss_coef": 0.02,
        "sliding_window": None,
    },
    "qwen2.5-7b": sizes(3584, 28, 28, 4, 18944, 152064)
    | {
        "architectures": ["Qwen2ForCausalLM"],
        "max_position_embeddings": 131072,
        "max_window_layers": 28,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "sliding_window": 131072,
        "use_mrope": False,
        "use_sliding_window": False,
    },
    "qwen1.5-moe": sizes(2048, 24, 16, 16, 5632, 151936)
    | {
        "architectures": ["Qwen2MoeForCausalLM"],
        "decoder_sparse_step": 1,
        "max_position_embeddings": 8192,
        "max_window_layers": 21,
        "moe_intermediate_size": 1408,
        "norm_topk_prob": False,
        "num_experts": 60,
        "num_experts_per_tok": 4,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "router_aux_loss_coef": 0.001,
        "shared_expert_intermediate_size": 5632,
        "sliding_window": 32768,
        "use_sliding_window": False,
    },
    "qwen3-0.6b": sizes(1024, 28, 16, 8, 3072, 151936)
    | {
        "architectures": ["Qwen3ForCausalLM"],
        "attention_bias": False,
        "head_dim": 128,
        "max_position_embeddings": 40960,
        "max_window_layers": 28,
        "rms_norm_eps": 1e-6,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": None,
        "tie_word_embeddings": True,
        "use_sliding_window": False,
    },
    "qwen3-30b-a3b": sizes(2048, 48, 32, 4, 6144, 151936)
    | {
        "architectures": ["Qwen3MoeForCausalLM"],
        "decoder_sparse_step": 1,
        "head_dim": 128,
        "max_position_embeddings": 40960,
        "max_window_layers": 48,
        "mlp_only_layers": [],
        "moe_intermediate_size": 768,
        "norm_topk_prob": True,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "sliding_window": None,
        "use_sliding_window": False,
    },
    "gemma-2b": sizes(2048, 18, 8, 1, 16384, 256000)
    | {
        "architectures": ["GemmaForCausalLM"],
        "head_dim": 256,
        "hidden_act": "gelu",
        "hidden_activation": None,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
    },
    "gemma-2-2b": sizes(2304, 26, 8, 4, 9216, 256000)
    | {
        "architectures": ["Gemma2ForCausalLM"],
        "attn_logit_softcapping": 50.0,
        "cache_implementation": "hybrid",
        "final_logit_softcapping": 30.0,
        "head_dim": 256,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "max_position_embeddings": 8192,
        "query_pre_attn_scalar": 256,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "sliding_window": 4096,
    },
    "gemma-3-1b": sizes(1152, 26, 4, 1, 6912, 262144)
    | {
        "architectures": ["Gemma3ForCausalLM"],
        "attn_logit_softcapping": None,
        "cache_implementation": "hybrid",
        "final_logit_softcapping": None,
        "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh",
        "max_position_embeddings": 32768,
        "query_pre_attn_scalar": 256,
        "rms_norm_eps": 1e-6,
        "rope_local_base_freq": 10000,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        "rope_theta": 1000000,
        "sliding_window": 512,
        "sliding_window_pattern": 6,
    },
    "phi-2": sizes(2560, 32, 32, 32, 10240, 51200)
    | {
        "architectures": ["PhiForCausalLM"],
        "embd_pdrop": 0.0,
        "hidden_act": "gelu_new",
        "layer_norm_eps": 1e-5,
        "max_position_embeddings": 2048,
        "partial_rotary_factor": 0.4,
        "qk_layernorm": False,
        "resid_pdrop": 0.1,
        "rope_scaling": None,
        "rope_theta": 10000.0,
    },
    "phi-4-mini": sizes(3072, 32, 24, 8, 8192, 200064)
    | {
        "architectures": ["Phi3ForCausalLM"],
        "auto_map": {"AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM"},
        "attention_bias": False,
        "full_attn_mod": 1,
        "interpolate_factor": 1,
        "lm_head_bias": False,
        "max_position_embeddings": 131072,
        "mlp_bias": False,
        "original_max_position_embeddings": 4096,
        "partial_rotary_factor": 0.75,
        "resid_pdrop": 0.0,
        "rms_norm_eps": 1e-5,
        "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 48, "long_factor": [2.0] * 48},
        "rope_theta": 10000.0,
        "sliding_window": 262144,
        "tie_word_embeddings": True,
    },
    "gpt2": GPT_SUMMARY
    | {
        "architectures": ["GPT2LMHeadModel"],
        "activation_function": "gelu_new",
        "attn_pdrop": 0.1,
        "embd_pdrop": 0.1,
        "layer_norm_epsilon": 1e-5,
        "n_ctx": 1024,
        "n_embd": 768,
        "n_head": 12,
        "n_layer": 12,
        "n_positions": 1024,
        "resid_pdrop": 0.1,
        "vocab_size": 50257,
    },
    "gpt-j-6b": GPT_SUMMARY
    | {
        "architectures": ["GPTJForCausalLM"],
        "activation_function": "gelu_new",
        "gradient_checkpointing": False,
        "layer_norm_epsilon": 1e-5,
        "n_embd": 4096,
        "n_head": 16,
        "n_inner": None,
        "n_layer": 28,
        "n_positions": 2048,
        "rotary": True,
        "rotary_dim": 64,
        "scale_attn_weights": True,
        "tie_word_embeddings": False,
        "tokenizer_class": "GPT2Tokenizer",
        "vocab_size": 50400,
    },
    "pythia-70m": sizes(512, 6, 8, None, 2048, 50304)
    | {
        "architectures": ["GPTNeoXForCausalLM"],
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-5,
        "max_position_embeddings": 2048,
        "rotary_emb_base": 10000,
        "rotary_pct": 0.25,
        "use_parallel_residual": True,
    },
    "opt-350m": {
        "architectures": ["OPTForCausalLM"],
        "_remove_final_layer_norm": False,
        "activation_dropout": 0.0,
        "activation_function": "relu",
        "do_layer_norm_before": False,
        "dropout": 0.1,
        "ffn_dim": 4096,
        "hidden_size": 1024,
        "init_std": 0.02,
        "layerdrop": 0.0,
        "max_position_embeddings": 2048,
        "num_attention_heads": 16,
        "num_hidden_layers": 24,
        "prefix": "</s>",
        "vocab_size": 50272,
        "word_embed_proj_dim": 512,
    },
    "bloom-560m": {
        "architectures": ["BloomForCausalLM"],
        "apply_residual_connection_post_layernorm": False,
        "attention_softmax_in_fp32": True,
        "bias_dropout_fusion": True,
        "layer_norm_epsilon": 1e-5,
        "masked_softmax_fusion": True,
        "n_embed": 1024,
        "n_inner": None,
        "n_layer": 24,
        "num_attention_heads": 16,
        "offset_alibi": 100,
        "pretraining_tp": 1,
        "seq_length": 2048,
        "skip_bias_add": True,
        "skip_bias_add_qkv": False,
        "vocab_size": 250880,
    },
    "falcon-7b": {
        "architectures": ["FalconForCausalLM"],
        "alibi": False,
        "apply_residual_connection_post_layernorm": False,
        "auto_map": {"AutoConfig": "configuration_falcon.FalconConfig"},
        "bias": False,
        "hidden_dropout": 0.0,
        "hidden_size": 4544,
        "layer_norm_epsilon": 1e-5,
        "multi_query": True,
        "new_decoder_architecture": False,
        "num_attention_heads": 71,
        "num_hidden_layers": 32,
        "parallel_attn": True,
        "vocab_size": 65024,
    },
    "stablelm-2-1.6b": sizes(2048, 24, 32, 32, 5632, 100352)
    | {
        "architectures": ["StableLmForCausalLM"],
        "layer_norm_eps": 1e-5,
        "max_position_embeddings": 4096,
        "partial_rotary_factor": 0.25,
        "rope_theta": 10000,
        "use_qkv_bias": True,
    },
    "starcoder2-3b": sizes(3072, 30, 24, 2, 12288, 49152)
    | {
        "architectures": ["Starcoder2ForCausalLM"],
        "activation_function": "gelu",
        "attention_softmax_in_fp32": True,
        "embedding_dropout": 0.1,
        "hidden_act": "gelu_pytorch_tanh",
        "layer_norm_epsilon": 1e-5,
        "max_position_embeddings": 16384,
        "mlp_type": "default",
        "norm_epsilon": 1e-5,
        "norm_type": "layer_norm",
        "residual_dropout": 0.1,
        "rope_theta": 999999.4420358813,
        "scale_attention_softmax_in_fp32": True,
        "scale_attn_weights": True,
        "sliding_window": 4096,
        "use_bias": True,
    },
    "olmo-1b": sizes(2048, 16, 16, 16, 8192, 50304)
    | {
        "architectures": ["OlmoForCausalLM"],
        "attention_bias": False,
        "clip_qkv": None,
        "max_position_embeddings": 2048,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
    },
    "olmo-2-7b": sizes(4096, 32, 32, 32, 11008, 100352)
    | {
        "architectures": ["Olmo2ForCausalLM"],
        "attention_bias": False,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "rope_scaling": None,
        "rope_theta": 500000,
    },
    "command-r": sizes(8192, 40, 64, 64, 22528, 256000)
    | {
        "architectures": ["CohereForCausalLM"],
        "layer_norm_eps": 1e-5,
        "logit_scale": 0.0625,
        "max_position_embeddings": 8192,
        "model_max_length": 131072,
        "rope_theta": 8000000.0,
        "use_qk_norm": False,
    },
    "granite-3.1-2b": sizes(2048, 40, 32, 8, 8192, 49155)
    | {
        "architectures": ["GraniteForCausalLM"],
        "attention_multiplier": 0.015625,
        "embedding_multiplier": 12.0,
        "logits_scaling": 8.0,
        "max_position_embeddings": 131072,
        "mlp_bias": False,
        "residual_multiplier": 0.22,
        "rms_norm_eps": 1e-5,
        "rope_scaling": None,
        "rope_theta": 5000000.0,
        "tie_word_embeddings": True,
    },
}


def mixer_of(name: str, layer: int = 0) -> Attention:
    return spec_from(COMMON | HUB[name]).layers[layer].mixer


@pytest.mark.parametrize("name", sorted(HUB))
def test_every_key_is_read(name: str) -> None:
    spec = spec_from(COMMON | HUB[name])
    assert spec.architecture == HUB[name]["architectures"][0]
    assert spec.vocab == HUB[name]["vocab_size"]


def test_llama_rope() -> None:
    assert mixer_of("llama-2-7b").position == Rope(theta=10000.0, dim=128)
    assert mixer_of("llama-3.1-8b").position == Rope(
        theta=500000.0, dim=128, scaling=Llama3Scaling(factor=8.0, low=1.0, high=4.0, original=8192)
    )
    assert mixer_of("llama-dynamic-old-spelling").position == Rope(
        theta=10000.0, dim=128, scaling=DynamicNtk(factor=2.0, original=4096)
    )
    assert spec_from(COMMON | HUB["llama-dynamic-old-spelling"]).max_len == 8192


def test_partial_rotary_in_three_spellings() -> None:
    assert mixer_of("phi-2").position == Rope(theta=10000.0, dim=32)
    assert mixer_of("pythia-70m").position == Rope(theta=10000.0, dim=16)
    assert mixer_of("gpt-j-6b").position == Rope(theta=10000.0, dim=64, interleaved=True)


def test_longrope_takes_its_length_from_beside_the_table() -> None:
    position = mixer_of("phi-4-mini").position
    assert isinstance(position, Rope) and isinstance(position.scaling, LongRope)
    assert (position.dim, position.scaling.original, position.scaling.factor) == (96, 4096, 32.0)


def test_windows() -> None:
    assert mixer_of("mistral-7b-v0.1").window == 4096
    assert mixer_of("qwen2.5-7b").window is None
    assert [mixer_of("gemma-2-2b", i).window for i in range(3)] == [4096, None, 4096]
    assert [mixer_of("gemma-3-1b", i).window for i in range(7)] == [512] * 5 + [None, 512]


def test_gemma3_scales_only_its_full_layers() -> None:
    local, full = mixer_of("gemma-3-1b", 0).position, mixer_of("gemma-3-1b", 5).position
    assert local == Rope(theta=10000.0, dim=256)
    assert isinstance(full, Rope) and full.theta == 1e6 and full.scaling is not None


def test_shapes_of_blocks() -> None:
    assert isinstance(spec_from(COMMON | HUB["gemma-2-2b"]).layers[0].norms, Sandwich)
    assert isinstance(spec_from(COMMON | HUB["opt-350m"]).layers[0].norms, PostResidual)
    assert spec_from(COMMON | HUB["opt-350m"]).embedding.positions == Learned(size=2048, offset=2)
    assert spec_from(COMMON | HUB["falcon-7b"]).layers[0].norms == Parallel(
        norm=spec_from(COMMON | HUB["falcon-7b"]).layers[0].norms.norm, shared=True
    )
    assert mixer_of("falcon-7b").kv_heads == 1
    assert isinstance(mixer_of("bloom-560m").position, Alibi)
    gemma = spec_from(COMMON | HUB["gemma-2b"]).layers[0].ffn
    assert isinstance(gemma, Gated) and gemma.act == "gelu_tanh"
    moe = spec_from(COMMON | HUB["qwen1.5-moe"]).layers[0].ffn
    assert isinstance(moe, Mixture) and (moe.experts, moe.top_k, moe.shared_width) == (60, 4, 5632)
