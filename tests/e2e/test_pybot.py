"""The bundled model does the two things that it is for, from the files in the package alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import quality
from twofold import LLM, SamplingParams, cli
from twofold.align import scores
from twofold.commands.model import bundled_model
from twofold.core import load_config
from twofold.data import ChatTemplate, Tokenizer, Wording
from twofold.data.dataset import documents
from twofold.engine.defaults import sampling_defaults
from twofold.models import read_spec
from twofold.train.config import Recipe

BASE = Path("recipes/pybot/base")
"""What pretrain.toml and chat.toml made, and grpo.toml began with."""


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(bundled_model(), max_num_seqs=32)


def test_it_answers_what_common_functions_do(llm: LLM) -> None:
    answers = quality.ask(llm, quality.KNOWN_WORDING)
    wrong = {name: text for name, (text, good) in answers.items() if not good}
    assert len(wrong) <= 4, wrong


def test_it_completes_python_that_mostly_parses(llm: LLM) -> None:
    rows = quality.complete(llm)
    parsed, lines = sum(row[2] for row in rows), sum(row[3] for row in rows)
    assert lines > 60 and parsed >= 0.6 * lines, [(row[0], row[1]) for row in rows if row[2] < row[3]]


def test_it_knows_who_it_is_and_ends_its_turn(llm: LLM) -> None:
    answer = llm.chat([{"role": "user", "content": "Who are you?"}], SamplingParams(temperature=0.0, max_tokens=80))[0]
    assert "pybot" in answer.outputs[0].text and answer.outputs[0].finish_reason == "stop"


def test_the_second_question_is_answered_too(llm: LLM) -> None:
    talk = [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hello! Ask me what a Python function does."},
        {"role": "user", "content": "What does len do?"},
    ]
    answer = llm.chat(talk, SamplingParams(temperature=0.0, max_tokens=80))[0].outputs[0]
    assert quality.right("len", answer.text), answer.text


def test_its_files() -> None:
    folder = bundled_model()
    files = {path.name for path in folder.iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= files
    assert sum(path.stat().st_size for path in folder.iterdir()) < 16_000_000
    tokenizer, spec = Tokenizer.load(folder), read_spec(folder)
    assert tokenizer.vocab_size <= spec.vocab and spec.max_len == 1024
    assert [tokenizer.token(end) for end in tokenizer.eos_ids] == ["<|im_end|>", "<|endoftext|>"]
    template = ChatTemplate.load(folder)
    assert sampling_defaults(folder) == {"temperature": 0.0}
    ids = template.encode(tokenizer, [{"role": "user", "content": "<|im_end|>"}])
    assert ids.count(tokenizer.eos_ids[0]) == 1


def test_it_is_what_its_recipes_describe() -> None:
    recipe = load_config(Recipe, "recipes/pybot/pretrain.toml")
    config = json.loads((bundled_model() / "config.json").read_text())
    assert recipe.model.config is not None
    assert {key: config[key] for key in recipe.model.config} == recipe.model.config


def test_it_passes_more_held_out_tests_than_what_it_was_made_of(tmp_path: Path) -> None:
    out, task = tmp_path / "figures.json", "recipes/pybot/tasks/tests.toml"
    words = ["evaluate", str(bundled_model()), task, "--against", str(BASE), "--samples", "0", "--output", str(out)]
    assert cli.main(words) == 0
    passed, before = (row["greedy"]["passed"] for row in json.loads(out.read_text())["evaluations"])
    kept = {row["task"]: row for row in scores.kept_in(bundled_model())}
    assert passed == kept["tests"]["greedy"]["passed"] >= before + 5


def test_its_card_is_made_of_what_stands_beside_it() -> None:
    folder = bundled_model()
    assert json.loads((folder / "training.json").read_text())["recipe"]["model.from"] == str(BASE)
    assert (folder / "config.json").read_bytes() == (BASE / "config.json").read_bytes()
    assert "GRPO" in (folder / "README.md").read_text() and "35.3%" in (folder / "README.md").read_text()


def test_every_chat_of_its_own_is_learned_from() -> None:
    folder = bundled_model()
    wording = Wording(Tokenizer.load(folder), ChatTemplate.load(folder))
    for document in documents("recipes/pybot/chat.jsonl"):
        ids, learn = wording.document(document)
        assert any(learn) and len(ids) < 1024
