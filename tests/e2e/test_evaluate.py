"""`twofold evaluate` as it is used: a model in this process, a running server, one against the other, and bad input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from served import Served
from tiny_checkpoint import make_checkpoint
from tiny_recipe import write_recipe

from twofold import cli
from twofold.train.launch import run

TASK = """prompts = "asked.jsonl"
k = [1, 4]
samples = 20
max_tokens = 8
seed = 3

[[rewards]]
kind = "regex"
pattern = "[a-m]"

[[rewards]]
kind = "length"
name = "short"
most = 4
weight = 0.0
"""
PROMPTS = [
    *({"prompt": f"The number {n} is"} for n in range(6)),
    *({"prompt": [{"role": "user", "content": f"Say {n}"}], "answer": str(n)} for n in range(4)),
]


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("task")
    (folder / "asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PROMPTS))
    (folder / "letters.toml").write_text(TASK)
    return folder / "letters.toml"


def evaluated(tmp_path: Path, *words: object) -> dict[str, Any]:
    assert cli.main(["evaluate", *map(str, words), "--num-blocks", "256", "--output", str(tmp_path / "out.json")]) == 0
    found: dict[str, Any] = json.loads((tmp_path / "out.json").read_text())
    return found


def test_a_model_here_and_a_server_give_the_same_figures(
    tiny: Path, server: Served, task: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = tmp_path / "rows.jsonl"
    few = ("--samples", 8)
    found = evaluated(tmp_path, tiny, task, "--against", f"{server.url}/v1", "--answers", rows, *few)
    here, there = found["evaluations"]
    assert here == there
    assert here["prompts"] == 10
    assert 0.0 < here["pass@k"]["1"]["value"] < here["pass@k"]["4"]["value"] <= 1.0
    assert set(here["rewards"]) == {"regex", "short"}
    differences = found["comparison"]["differences"]
    assert set(differences) == {
        *("greedy", "pass@1", "pass@4", "reward, greedy", "reward, sampled", "rewards.regex", "rewards.short")
    }
    assert {figure["verdict"] for figure in differences.values()} == {"not shown"}
    answers = [json.loads(line) for line in rows.read_text().splitlines()]
    assert [row["prompt"] for row in answers[:10]] == [row["prompt"] for row in PROMPTS]
    assert [row["greedy"] for row in answers[:10]] == [row["greedy"] for row in answers[10:]]
    assert len({answer["text"] for answer in answers[0]["samples"]}) > 1
    told = capsys.readouterr().out
    assert "tiny on letters: 10 prompts, for each a greedy answer and 8 sampled ones" in told
    assert "tiny against tiny, prompt by prompt" in told


def test_more_samples_than_a_request_may_ask_for(server: Served, task: Path, tmp_path: Path) -> None:
    found = evaluated(tmp_path, f"{server.url}/v1", task, "--limit", 2, "--answers", tmp_path / "rows.jsonl")
    assert found["evaluations"][0]["samples"] == 20
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [len(row["samples"]) for row in rows] == [20, 20]
    assert len({answer["text"] for answer in rows[0]["samples"]}) > 10, "no part repeats another"


def test_the_same_command_gives_the_same_bytes_and_another_model_other_figures(
    tiny: Path, task: Path, tmp_path: Path
) -> None:
    other = make_checkpoint(tmp_path / "other", seed=5)
    once = evaluated(tmp_path, tiny, task, "--against", other)
    again = evaluated(tmp_path, tiny, task, "--against", other)
    assert once == again
    one, another = once["evaluations"]
    assert one["reward"] != another["reward"]
    assert (one["model"], another["model"]) == ("tiny", "other")


def test_a_finished_run_has_a_card_and_keeps_its_evaluation(
    task: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "runs" / "small"
    assert run(write_recipe(tmp_path), {"run.output": output, "schedule.steps": 4}) == 0
    model = output / "model"
    before = ModelCard.load(model / "README.md")
    assert before.data.tags == ["twofold", "llama", "pretrain"]
    assert "| Steps | 4 |" in before.text
    assert str(tmp_path) not in before.content
    texts = task.with_name("texts.toml")
    texts.write_text(TASK.replace("asked.jsonl", "texts.jsonl"))
    texts.with_name("texts.jsonl").write_text(json.dumps(PROMPTS[0]) + "\n")
    found = evaluated(tmp_path, output, texts, "--record")
    assert found["evaluations"][0]["model"] == "small"
    assert json.loads((model / "evaluation.json").read_text())["evaluations"] == found["evaluations"]
    card = ModelCard.load(model / "README.md")
    greedy = found["evaluations"][0]["greedy"]["value"]
    assert next(result.metric_value for result in card.data.eval_results or []) == greedy
    assert "in the card" in capsys.readouterr().out
    exported = tmp_path / "exported"
    assert cli.main(["checkpoint", "export", str(output), "--output", str(exported)]) == 0
    theirs = ModelCard.load(exported / "README.md")
    assert theirs.data.model_name == "exported"
    assert theirs.text.split("## Training")[1] == card.text.split("## Training")[1], (
        "the same weights, the same figures"
    )


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("MODEL", "nowhere.toml"), "no such recipe: nowhere.toml"),
        (("nowhere", "TASK"), "nowhere has no config.json"),
        (("http://127.0.0.1:9/v1", "TASK"), "is `twofold serve` running?"),
        (("http://:x/v1", "TASK"), "MODEL must look like"),
        (("MODEL", "TASK", "--limit", "none"), "--limit must be a whole number"),
        (("MODEL", "TASK", "--samples", "2"), "less than the largest k, 4"),
        (("MODEL", "TASK", "--prompts", "gone.jsonl"), "gone.jsonl"),
        (("MODEL", "TASK", "--output", "no/such/folder/out.json"), "make it first"),
        (("http://127.0.0.1:9/v1", "TASK", "--record"), "give its directory"),
        (("MODEL", "TASK", "--anwsers", "x"), "did you mean '--answers'"),
    ],
)
def test_what_cannot_be_is_told_in_one_line(
    words: tuple[str, ...], told: str, tiny: Path, task: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = {"MODEL": str(tiny), "TASK": str(task)}
    assert cli.main(["evaluate", *(given.get(word, word) for word in words)]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1
    assert told in said[0]


def test_a_server_is_asked_for_a_model_that_it_has(
    server: Served, task: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["evaluate", f"{server.url}/v1", str(task), "--served-model", "huge"]) == 2
    assert "has no model 'huge': it has tiny" in capsys.readouterr().err
