"""The model card: what Hugging Face reads in it, what a reader does, and that nobody else's is touched."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from twofold.core import CheckpointError
from twofold.train import card

CONFIG = {"model_type": "llama", "num_hidden_layers": 2, "hidden_size": 64, "vocab_size": 300}
RECIPE = {
    "kind": "chat",
    "model.from": "/somebody/else/model",
    "data.train": ["corpus/a.txt", "/private/b.jsonl"],
    "optimizer.lr": 1e-3,
    "optimizer.eps": None,
    "model.recompute_layers": {"0-3": "full"},
    "rewards.0.kind": "function",
    "rewards.0.path": "/elsewhere/score.py:good",
}
ROWS = [
    {"step": 1, "loss": 9.0, "tokens_per_second": 5.0},
    {"step": 2, "loss": 2.25, "valid_loss": 2.5},
    {"step": 3, "loss": 1.0},
]
FIGURE = {"value": 0.375, "low": 0.242, "high": 0.53}
RECORD = {
    "task": 'tests "hard"',
    "model": "small",
    "prompts": 40,
    "samples": 8,
    "greedy": {"passed": 15, **FIGURE},
    "pass@k": {"1": FIGURE, "8": FIGURE | {"value": 0.6}},
    "reward": {"greedy": FIGURE},
    "rewards": {"python_passes_tests": FIGURE},
    "settings": {"max_tokens": 24, "temperature": 1.0, "success": 1.0, "level": 0.95},
}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "small"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


def put(model: Path, *records: dict[str, Any]) -> str:
    source = model.parent / "evaluation.json"
    source.write_text(json.dumps({"evaluations": records}))
    card.put(model, card.training(RECIPE, 2, 1234567, ROWS), source if records else None, "small")
    return (model / "README.md").read_text()


def test_hugging_face_reads_the_results(model: Path) -> None:
    text = put(model, RECORD)
    data = ModelCard(text).data
    assert (data.library_name, data.pipeline_tag, data.model_name) == ("transformers", "text-generation", "small")
    assert data.tags == ["twofold", "llama", "chat"]
    results = [(r.dataset_name, r.metric_type, r.metric_name, r.metric_value) for r in data.eval_results or []]
    assert results == [
        ('tests "hard"', "pass@1", "greedy pass rate", 0.375),
        ('tests "hard"', "pass@1", "pass@1", 0.375),
        ('tests "hard"', "pass@8", "pass@8", 0.6),
    ]


def test_a_reader_finds_training_and_evaluation(model: Path) -> None:
    text = put(model, RECORD)
    assert "| Steps | 2 |" in text
    assert "| Tokens | 1,234,567 |" in text
    assert "| Training loss | 2.2500 |" in text  # of the step that it was trained to
    assert "| Validation loss | 2.5000 |" in text
    assert "| pass@8 | 60.0% | 24.2% to 53.0% |" in text
    assert "40 prompts, greedy and 8 samples each" in text
    recipe = tomllib.loads(text.split("```toml\n")[1].split("```")[0])
    assert recipe["optimizer"] == {"lr": 1e-3}
    assert recipe["model"]["recompute_layers"] == {"0-3": "full"}
    assert recipe["rewards"]["0"] == {"kind": "function", "path": "score.py:good"}


def test_no_path_of_somebodys_machine_is_told(model: Path) -> None:
    text = put(model)
    assert "somebody" not in text
    assert "private" not in text
    assert '"corpus/a.txt", "b.jsonl"' in text


def test_without_an_evaluation_none_is_told(model: Path) -> None:
    text = put(model)
    assert "Evaluation" not in text
    assert ModelCard(text).data.eval_results is None


def test_the_same_model_has_the_same_card(model: Path) -> None:
    assert put(model, RECORD) == put(model, RECORD)


def test_a_later_evaluation_is_added_and_somebodys_own_card_is_left_alone(model: Path) -> None:
    put(model)
    (model / "evaluation.json").write_text(json.dumps({"evaluations": [RECORD]}))
    assert card.refresh(model)
    assert "## Evaluation" in (model / "README.md").read_text()
    (model / "README.md").write_text("# Mine\n")
    assert not card.refresh(model)
    assert (model / "README.md").read_text() == "# Mine\n"


def test_a_model_that_was_not_trained_here_gets_no_card(model: Path) -> None:
    assert not card.refresh(model)
    assert not (model / "README.md").exists()


def test_a_damaged_record_is_named(model: Path) -> None:
    put(model)
    (model / "evaluation.json").write_text('{"evaluations": [{"task": "x"}]}')
    with pytest.raises(CheckpointError, match=f"the card of {model}"):
        card.refresh(model)
    (model / "evaluation.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"evaluation\.json cannot be read"):
        card.refresh(model)
