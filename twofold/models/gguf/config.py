"""A GGUF file's metadata as the config.json of the checkpoint that it was made from. What nobody reads is refused.

Two things are not said there and known all the same: which layers slide, and by what scores are divided in Gemma's
largest models. Llama 3's stretched rope is there as a tensor of factors (`rope_freqs.weight`), from which its settings
are found again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ...core.errors import CheckpointError, unknown

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen2moe": "Qwen2MoeForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3moe": "Qwen3MoeForCausalLM",
    "gemma": "GemmaForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3": "Gemma3ForCausalLM",
}
NUMBERS = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.key_length": "head_dim",
    "attention.sliding_window": "sliding_window",
    "rope.freq_base": "rope_theta",
    "rope.freq_base_swa": "rope_local_base_freq",
    "vocab_size": "vocab_size",
    "expert_count": "num_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}
LLAMA3 = ({"factor": 8.0, "original": 8192}, {"factor": 32.0, "original": 8192})


def config_of(
    meta: Mapping[str, Any],
    names: Sequence[str],
    vocab: int,
    factors: Sequence[float] | None = None,
) -> dict[str, Any]:
    """config.json's contents; `names` are the tensors', `vocab` the rows of the embedding, `factors` a rope's.

    Raises:
        CheckpointError: an architecture that is not read, a setting that is missing, or one that nobody reads.
    """
    kind = meta.get("general.architecture")
    if kind not in ARCHITECTURES:
        raise CheckpointError("GGUF: " + unknown("architecture", str(kind), ARCHITECTURES))
    told = {key.removeprefix(f"{kind}."): value for key, value in meta.items() if key.startswith(f"{kind}.")}
    config = {ours: told.pop(theirs) for theirs, ours in NUMBERS.items() if told.get(theirs) is not None}
    for needed in ("hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads"):
        if type(config.get(needed)) is not int or config[needed] < 1:
            theirs = next(key for key, ours in NUMBERS.items() if ours == needed)
            raise CheckpointError(f"GGUF: '{kind}.{theirs}' must be a number, not {config.get(needed)!r}")
    config |= {
        "architectures": [ARCHITECTURES[kind]],
        "vocab_size": vocab,
        "tie_word_embeddings": "output.weight" not in names,
    }
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    config["head_dim"] = head_dim
    if (
        told.pop("attention.value_length", head_dim) != head_dim
        or told.pop("rope.dimension_count", head_dim) != head_dim
    ):
        raise CheckpointError("GGUF: values, or what of a head is turned, are of another size than its keys")
    if scaling := _scaling(told, factors, config, head_dim):
        config["rope_scaling"] = scaling
    if told:
        raise CheckpointError(f"GGUF: nothing reads {', '.join(sorted(f'{kind}.{key}' for key in told))}")
    config |= _ids(meta) | _family(kind, config)
    if "blk.0.attn_q.bias" in names and kind == "llama":
        config["attention_bias"] = True
    return config


def _family(kind: str, config: dict[str, Any]) -> dict[str, Any]:
    """What a family's config.json says besides; changes what it says otherwise."""
    if kind == "llama":
        window = config.pop("sliding_window", None)
        if config.get("num_experts"):
            config["num_local_experts"] = config.pop("num_experts")
            return {"architectures": ["MixtralForCausalLM"], "sliding_window": window}
        return {"architectures": ["MistralForCausalLM"], "sliding_window": window} if window else {}
    if (
        kind in ("qwen2", "qwen2moe")
        and config.pop("head_dim") * config["num_attention_heads"] != config["hidden_size"]
    ):
        raise CheckpointError(f"GGUF: heads of a {kind} model must fill its width")
    if kind in ("qwen2moe", "qwen3moe"):
        return {"norm_topk_prob": kind == "qwen3moe"}
    if not kind.startswith("gemma"):
        return {}
    layers, head_dim = config["num_hidden_layers"], config["head_dim"]
    largest = (kind, layers) in (("gemma2", 46), ("gemma3", 62))
    each = config["hidden_size"] // config["num_attention_heads"] if largest else head_dim
    return {"hidden_activation": "gelu_pytorch_tanh"} | ({} if kind == "gemma" else {"query_pre_attn_scalar": each})


def _scaling(
    told: dict[str, Any], factors: Sequence[float] | None, config: Mapping[str, Any], head_dim: int
) -> dict[str, Any] | None:
    kind = told.pop("rope.scaling.type", None)
    found = {
        key: told.pop(f"rope.scaling.{theirs}", None)
        for key, theirs in (("factor", "factor"), ("original_max_position_embeddings", "original_context_length"))
    }
    told.pop("rope.scaling.finetuned", None)
    if factors is not None:
        return _llama3(factors, float(config.get("rope_theta", 10_000.0)), head_dim)
    if kind in (None, "none"):
        return None
    if kind not in ("linear", "yarn"):
        raise CheckpointError(f"GGUF: rope.scaling.type is {kind!r}; none, linear and yarn are read")
    return {"rope_type": kind} | {key: value for key, value in found.items() if value is not None}


def _llama3(factors: Sequence[float], theta: float, head_dim: int) -> dict[str, Any]:
    """The settings of Llama 3's rope whose factors these are (as llama.cpp computes them)."""
    for known in LLAMA3:
        factor, original = known["factor"], known["original"]
        expected = [_factor(theta ** (2 * i / head_dim), factor, original) for i in range(head_dim // 2)]
        if len(factors) == len(expected) and all(
            math.isclose(a, b, rel_tol=1e-3) for a, b in zip(factors, expected, strict=True)
        ):
            return {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": int(original),
            }
    raise CheckpointError("GGUF: rope_freqs.weight holds factors that are not Llama 3's")


def _factor(slowness: float, factor: float, original: float) -> float:
    length = 2 * math.pi * slowness
    if length < original / 4.0:
        return 1.0
    if length > original:
        return factor
    smooth = (original / length - 1.0) / 3.0
    return 1.0 / ((1 - smooth) / factor + smooth)


def _ids(meta: Mapping[str, Any]) -> dict[str, Any]:
    names = {"bos_token_id": "bos_token_id", "eos_token_id": "eos_token_id", "pad_token_id": "padding_token_id"}
    found = {ours: meta.get(f"tokenizer.ggml.{theirs}") for ours, theirs in names.items()}
    return {key: value for key, value in found.items() if value is not None}
