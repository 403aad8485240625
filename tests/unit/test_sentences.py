"""sentence-transformers' files: what is pooled, what follows, what is refused; and the settings that they decide."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.parity.sentence_checkpoint import sentences
from twofold.core import CheckpointError, ConfigError
from twofold.engine.config import EngineConfig
from twofold.engine.kinds import decided
from twofold.engine.pooler import activation_of
from twofold.models.sentences import read_sentences
from twofold.models.weights import spec_from

BERT: dict[str, Any] = {
    "architectures": ["BertModel"],
    "vocab_size": 50,
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 8,
    "max_position_embeddings": 64,
}
CAUSAL = {"architectures": ["LlamaForCausalLM"], "max_position_embeddings": 64}


def change(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_without_a_word_of_the_checkpoint(tmp_path: Path) -> None:
    assert read_sentences(tmp_path, encoder=True).pooling == "cls"
    found = read_sentences(tmp_path, encoder=False)
    assert found.pooling == "last" and found.normalize and found.similarity == "cosine" and found.width(40) == 40
    assert read_sentences(tmp_path, encoder=False, pooling="mean").pooling == "mean"


@pytest.mark.parametrize(("mode", "how"), [("cls_token", "cls"), ("mean_tokens", "mean"), ("lasttoken", "last")])
def test_what_the_checkpoint_says(mode: str, how: str, tmp_path: Path) -> None:
    told = {"prompts": {"query": "find: "}, "default_prompt_name": "query", "similarity_fn_name": "dot"}
    sentences(tmp_path, mode, normalize=False, dense=(40, 12), **told)
    (tmp_path / "sentence_bert_config.json").write_text('{"max_seq_length": 48, "do_lower_case": false}')
    found = read_sentences(tmp_path, encoder=True)
    assert (found.pooling, found.normalize, found.prompt, found.similarity) == (how, False, "find: ", "dot")
    assert found.max_len == 48 and found.width(40) == 12 and found.dense[0].act == "tanh"
    assert read_sentences(tmp_path, encoder=True, pooling="cls").pooling == "cls"


def test_the_newer_spelling_of_a_mode(tmp_path: Path) -> None:
    sentences(tmp_path, "mean_tokens")
    (tmp_path / "1_Pooling" / "config.json").write_text('{"embedding_dimension": 40, "pooling_mode": "mean"}')
    assert read_sentences(tmp_path, encoder=True).pooling == "mean"


@pytest.mark.parametrize(
    ("file", "fields", "match"),
    [
        ("1_Pooling/config.json", {"pooling_mode_max_tokens": True}, "the first token, the last or the mean"),
        ("1_Pooling/config.json", {"pooling_mode_mean_tokens": False}, "the first token, the last or the mean"),
        ("1_Pooling/config.json", {"include_prompt": False}, "include_prompt"),
        ("2_Dense/config.json", {"activation_function": "torch.nn.modules.activation.Mish"}, "Mish"),
        ("2_Dense/config.json", {"out_features": 13}, "asks for"),
        ("2_Dense/config.json", {"bias": False}, "asks for"),
        ("config_sentence_transformers.json", {"similarity_fn_name": "manhattan"}, "manhattan"),
        ("config_sentence_transformers.json", {"default_prompt_name": "query"}, "query"),
    ],
)
def test_what_would_be_another_vector_is_refused(file: str, fields: dict, match: str, tmp_path: Path) -> None:
    sentences(tmp_path, "mean_tokens", dense=(40, 12))
    change(tmp_path / file, **fields)
    with pytest.raises(CheckpointError, match=match):
        read_sentences(tmp_path, encoder=True)


@pytest.mark.parametrize(
    ("steps", "match"),
    [
        ([("Transformer", ""), ("WeightedLayerPooling", "1_P")], "WeightedLayerPooling"),
        ([("Transformer", ""), ("Dense", "2_Dense")], "Dense"),
        ([("Transformer", ""), ("Pooling", "../1_Pooling")], "not a folder beside it"),
        ([("Transformer", ""), ("Pooling", "1_Pooling"), ("Pooling", "1_Pooling")], "Pooling"),
    ],
)
def test_steps_that_are_not_done(steps: list[tuple[str, str]], match: str, tmp_path: Path) -> None:
    sentences(tmp_path, "mean_tokens", dense=(40, 12))
    listed = [{"type": f"sentence_transformers.models.{kind}", "path": path} for kind, path in steps]
    (tmp_path / "modules.json").write_text(json.dumps(listed))
    with pytest.raises(CheckpointError, match=match):
        read_sentences(tmp_path, encoder=True)


def test_damaged_files(tmp_path: Path) -> None:
    sentences(tmp_path, "mean_tokens", dense=(40, 12))
    save_file({"linear.weight": torch.zeros(12, 40)}, tmp_path / "2_Dense" / "model.safetensors")
    with pytest.raises(CheckpointError, match="asks for"):
        read_sentences(tmp_path, encoder=True)
    (tmp_path / "2_Dense" / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="pickled weights are not read"):
        read_sentences(tmp_path, encoder=True)
    for text, match in (("{}", "not a JSON list"), ("[3]", "not a list of tables"), ("[", "not JSON")):
        (tmp_path / "modules.json").write_text(text)
        with pytest.raises(CheckpointError, match=match):
            read_sentences(tmp_path, encoder=True)


# ------------------------------------------------------------------------------------------------ settings
@pytest.mark.parametrize(
    ("table", "modules", "given", "runner"),
    [
        (BERT, False, {}, "pooling"),
        (CAUSAL, False, {}, "generate"),
        (CAUSAL, True, {}, "pooling"),
        (CAUSAL, True, {"runner": "generate"}, "generate"),
        (CAUSAL, True, {"convert": "embed"}, "generate"),
        (CAUSAL, False, {"runner": "pooling", "pooling": "mean"}, "pooling"),
        ({"architectures": ["LlamaForSequenceClassification"]}, False, {}, "pooling"),
        ({"architectures": ["Unheard"]}, False, {}, "generate"),
        ([], False, {}, "generate"),
    ],
)
def test_what_an_engine_is_to_be(table: Any, modules: bool, given: dict, runner: str, tmp_path: Path) -> None:
    if modules:
        (tmp_path / "modules.json").write_text("[]")
    assert decided(EngineConfig(**given), tmp_path, table).runner == runner


def test_the_longest_text_that_a_model_was_made_for(tmp_path: Path) -> None:
    (tmp_path / "sentence_bert_config.json").write_text('{"max_seq_length": 32}')
    assert decided(EngineConfig(), tmp_path, BERT).max_model_len == 32
    assert decided(EngineConfig(max_model_len=48), tmp_path, BERT).max_model_len == 48
    assert decided(EngineConfig(), tmp_path, CAUSAL).max_model_len is None
    (tmp_path / "sentence_bert_config.json").write_text('{"max_seq_length": 512}')
    assert decided(EngineConfig(), tmp_path, BERT).max_model_len is None


def test_settings_that_contradict(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="adds to generation"):
        decided(EngineConfig(convert="embed"), tmp_path, BERT)
    with pytest.raises(ConfigError, match="add --runner pooling"):
        decided(EngineConfig(pooling="cls"), tmp_path, CAUSAL)


def test_what_stands_behind_a_score_head() -> None:
    one = spec_from(BERT | {"architectures": ["BertForSequenceClassification"], "id2label": {"0": "a"}})
    two = spec_from(BERT | {"architectures": ["BertForSequenceClassification"]})
    assert activation_of(one, {}) == "sigmoid" and activation_of(two, {}) == "softmax"
    for problem, act in (
        ("regression", "none"),
        ("single_label_classification", "softmax"),
        ("multi_label_classification", "sigmoid"),
    ):
        assert activation_of(two, {"problem_type": problem}) == act
    old = {"sbert_ce_default_activation_function": "torch.nn.modules.linear.Identity"}
    assert activation_of(one, old) == "none" and activation_of(one, old | {"problem_type": "regression"}) == "none"
