"""An evaluation as figures: what is counted, what two models differ by, and the file that keeps it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from twofold.align import scores
from twofold.align.episode import Group, Prompt, Rollout
from twofold.align.estimates import wilson
from twofold.align.evaluate import Drawing, Evaluation, evaluate
from twofold.align.rewards import Judgement, RewardConfig
from twofold.align.task import Task
from twofold.core import ConfigError, WorkerError

TASK = Task(name="toy", prompts="none", rewards=(RewardConfig(kind="length", most=9),), k=(1, 2), samples=4)
PROMPTS = [Prompt(number=n, ids=(), shown=f"say {n}", columns={"right": n}) for n in range(12)]


class Panel:
    """Gives a text that is a number its value, in two parts; "?" nobody can judge."""

    def score(self, prompts, completions, completion_ids, columns, *, step):  # type: ignore[no-untyped-def]
        assert len(prompts) == len(completions) == len(completion_ids) == len(columns["right"])
        values = [None if text == "?" else float(text) for text in completions]
        doubled = [None if value is None else 2 * value for value in values]
        faults = {"one": {"raised": completions.count("?")}, "two": {}}
        return Judgement(totals=values, parts={"one": values, "two": doubled}, faults=faults, notes=[])  # type: ignore[arg-type]


def answers(texts: Sequence[str], greedy: str = "1"):  # type: ignore[no-untyped-def]
    """An answerer who says `greedy`, and of the samples of every prompt the same texts; prompts in no order."""

    def answer(prompts: Sequence[Prompt], drawing: Drawing) -> Iterator[Group]:
        said = [greedy] if drawing.temperature == 0.0 else list(texts)
        for prompt in reversed(prompts):
            made = [_rollout(prompt, n, text) for n, text in enumerate(said)]
            yield Group(prompt=prompt, rollouts=tuple(made))

    return answer


def _rollout(prompt: Prompt, sample: int, text: str) -> Rollout:
    ids = tuple(range(len(text)))
    same = {"logprobs": (0.0,) * len(ids), "mine": (True,) * len(ids), "versions": (0,) * len(ids)}
    return Rollout(prompt=prompt, sample=sample, ids=ids, finish="length" if text == "0" else "stop", text=text, **same)  # type: ignore[arg-type]


def made(texts: Sequence[str], greedy: str = "1", model: str = "one") -> Evaluation:
    return evaluate(TASK, PROMPTS, answers(texts, greedy), Panel(), model=model)  # type: ignore[arg-type]


def test_figures_of_answers_that_are_all_alike() -> None:
    found = scores.record(made(["1", "0", "0", "1.5"]))
    assert (found["task"], found["model"], found["prompts"], found["samples"]) == ("toy", "one", 12, 4)
    sure = wilson(12, 12)
    assert found["greedy"] == {"passed": 12, "value": 1.0, "low": round(sure.low, 6), "high": 1.0}
    assert found["pass@k"]["1"] == {"value": 0.5, "low": 0.5, "high": 0.5}
    assert found["pass@k"]["2"]["value"] == pytest.approx(1 - 1 / 6, abs=1e-6)  # of six pairs one has no pass
    assert found["reward"]["sampled"]["value"] == 0.625
    assert found["rewards"]["two"]["value"] == 1.25
    assert found["truncated"] == 0.4
    assert found["length"] == pytest.approx((1 + 1 + 1 + 1 + 3) / 5)


def test_an_answer_that_nobody_judged_has_not_passed() -> None:
    found = scores.record(made(["1", "?", "?", "?"], greedy="?"))
    assert found["greedy"]["passed"] == 0
    assert found["pass@k"]["1"]["value"] == 0.25
    assert found["unjudged"] == 48
    assert found["faults"] == {"one": 48, "two": 0}
    assert found["reward"]["sampled"]["value"] == 1.0  # of those that were judged
    assert "greedy" not in found["reward"]


def test_a_comparison_is_of_pairs() -> None:
    good, bad = made(["1", "1", "0", "0"], greedy="1"), made(["0", "0", "0", "1"], greedy="0", model="other")
    found = scores.compare(good, bad)
    assert (found["model"], found["against"], found["prompts"]) == ("one", "other", 12)
    assert found["differences"]["greedy"] == {"value": 1.0, "low": 1.0, "high": 1.0, "verdict": "better"}
    assert found["differences"]["pass@1"]["value"] == 0.25
    back = scores.compare(bad, good)["differences"]
    assert {figure["verdict"] for figure in back.values()} == {"worse"}
    assert {f["verdict"] for f in scores.compare(good, good)["differences"].values()} == {"not shown"}


def test_each_answer_is_told_with_what_it_was_worth() -> None:
    rows = list(scores.answers(made(["1", "0", "?", "0.5"])))
    assert [row["prompt"] for row in rows] == [prompt.shown for prompt in PROMPTS]
    assert rows[3]["columns"] == {"right": 3}
    assert [answer["reward"] for answer in rows[3]["samples"]] == [1.0, 0.0, None, 0.5]
    assert rows[3]["greedy"]["parts"] == {"one": 1.0, "two": 2.0}


def test_an_answer_that_never_comes_is_missed() -> None:
    with pytest.raises(WorkerError, match="not answered 4 times"):
        made(["1", "0"])


def test_a_server_that_hides_its_tokens_leaves_the_length_open() -> None:
    found = made(["11", "0", "0", "1"])
    bare = [rollout for outcome in found.outcomes for rollout in (outcome.greedy.rollout,)]
    for rollout in bare:
        object.__setattr__(rollout, "ids", ())
    assert scores.record(found)["length"] is None


def test_records_are_kept_by_task(tmp_path: Path) -> None:
    first = scores.record(made(["1", "0", "0", "0"]))
    path = scores.keep(tmp_path, first)
    assert path.read_bytes() == scores.keep(tmp_path, first).read_bytes()
    scores.keep(tmp_path, first | {"task": "another"})
    newer = first | {"prompts": 99}
    scores.keep(tmp_path, newer)
    kept = scores.kept_in(tmp_path)
    assert [one["task"] for one in kept] == ["another", "toy"]
    assert kept[1] == json.loads(json.dumps(newer))
    path.write_text("[]")
    with pytest.raises(ConfigError, match="not a record of evaluations"):
        scores.keep(tmp_path, first)
