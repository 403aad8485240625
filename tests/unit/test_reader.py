"""What config.json may not do: carry a setting that nobody reads, or ask for a model that is not built."""

from __future__ import annotations

from typing import Any

import pytest

from twofold.core.errors import CheckpointError
from twofold.models import spec_from
from twofold.models.spec import Rope

BASE: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "vocab_size": 99,
}


def test_the_base_is_a_model() -> None:
    assert len(spec_from(BASE).layers) == 2


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"attention_sinks": 4}, "attention_sinks"),
        ({"is_encoder_decoder": True}, "is_encoder_decoder"),
        ({"add_cross_attention": True}, "add_cross_attention"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"hidden_act": "mish"}, "unknown activation 'mish'"),
        ({"hidden_act": 3}, "must be a string"),
        ({"hidden_size": "32"}, "must be a whole number"),
        ({"hidden_size": 32.5}, "must be a whole number"),
        ({"hidden_size": True}, "must be a whole number"),
        ({"num_hidden_layers": 0}, "at least 1"),
        ({"num_attention_heads": 5}, "not a multiple"),
        ({"num_key_value_heads": 3}, "cannot share"),
        ({"attention_bias": 1}, "true or false"),
        ({"architectures": ["LlamaForCausalLm"]}, "did you mean 'LlamaForCausalLM'"),
        ({"architectures": []}, "must name one architecture"),
        ({"rope_scaling": {"type": "spiral", "factor": 2.0}}, "unknown rope_type 'spiral'"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling.factor"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0, "twist": 1}}, "rope_scaling.twist"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"rope_theta": 5.0}}, "disagree"),
        ({"rope_theta": 5.0, "rotary_emb_base": 6.0}, "differ"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "rope_parameters.partial_rotary_factor"),
    ],
)
def test_refused(change: dict[str, Any], said: str) -> None:
    with pytest.raises(CheckpointError, match=said):
        spec_from(BASE | change)


def test_a_missing_size_is_named() -> None:
    config = {key: value for key, value in BASE.items() if key != "hidden_size"}
    with pytest.raises(CheckpointError, match="lacks 'hidden_size'"):
        spec_from(config)


def test_bookkeeping_is_not_read_and_not_missed() -> None:
    extra = {"use_cache": False, "torch_dtype": "float16", "attention_dropout": 0.1, "id2label": {"0": "A"}}
    assert spec_from(BASE | extra) == spec_from(BASE)


def test_both_rope_tables_may_say_the_same() -> None:
    table = {"rope_type": "linear", "factor": 2.0, "rope_theta": 5000.0}
    old = {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_theta": 5000.0}
    position = spec_from(BASE | {"rope_parameters": table} | old).layers[0].mixer.position
    assert isinstance(position, Rope) and position.theta == 5000.0


def test_null_and_absent_windows_differ_for_mistral() -> None:
    mistral = BASE | {"architectures": ["MistralForCausalLM"], "num_key_value_heads": 2}
    assert spec_from(mistral).layers[0].mixer.window == 4096
    assert spec_from(mistral | {"sliding_window": None}).layers[0].mixer.window is None


@pytest.mark.parametrize(
    ("architecture", "change", "said"),
    [
        ("BloomForCausalLM", {"apply_residual_connection_post_layernorm": True}, "apply_residual"),
        ("FalconForCausalLM", {"new_decoder_architecture": True, "parallel_attn": False}, "parallel_attn"),
        ("FalconForCausalLM", {"num_ln_in_parallel_attn": 2}, "num_ln_in_parallel_attn"),
        ("PhiForCausalLM", {"tie_word_embeddings": True}, "tied head"),
        ("PhiForCausalLM", {"partial_rotary_factor": 0.4}, "even number"),
        ("Phi3ForCausalLM", {"mlp_bias": True}, "mlp_bias"),
        ("Qwen2ForCausalLM", {"layer_types": ["full_attention", "chunked"]}, "layer_types"),
        ("Qwen2ForCausalLM", {"layer_types": ["full_attention"]}, "layer_types"),
        ("Gemma3ForCausalLM", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        ("MistralForCausalLM", {"sliding_window": 0, "num_key_value_heads": 2}, "at least 1"),
        ("MixtralForCausalLM", {"num_experts_per_tok": 9, "num_key_value_heads": 2}, "9 of 8 experts"),
        ("Qwen2ForCausalLM", {"rope_parameters": {"full_attention": {"rope_theta": 5.0}}}, "one rope for all"),
        ("GemmaForCausalLM", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
    ],
)
def test_refused_by_its_family(architecture: str, change: dict[str, Any], said: str) -> None:
    with pytest.raises(CheckpointError, match=said):
        spec_from(BASE | {"architectures": [architecture]} | change)
