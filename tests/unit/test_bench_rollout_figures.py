"""The rollout benchmark's sums: rates, ratios, and what it takes to call two engines' work the same."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rollout_figures import Side, alike, ratios, same_work, told
from rollout_shapes import POLICIES, QUICK, Work, make, prompts_file

from twofold.data import Tokenizer
from twofold.models import spec_from


def side(seconds: list[float], rollout: list[float], tokens: int = 100, reward: float = 0.5, norm: float = 2.0) -> Side:
    made = Side(first={"grad_norm": norm, "reward": 0.5, "loss": 0.0})
    for whole, part in zip(seconds, rollout, strict=True):
        figures = {"reward": reward, "reward_std": 0.1}
        clocks = {"seconds": [whole], "rollout": [part], "processor": [whole], "rollout_processor": [part]}
        made.add({**clocks, "tokens": [tokens], "told": [figures], "peak_mib": 1.0})
    return made


def test_ratios_are_of_tokens_and_of_turns() -> None:
    ours, theirs = side([2.0, 4.0, 2.0], [1.0, 1.0, 1.0]), side([20.0, 20.0, 10.0], [10.0, 20.0, 30.0], tokens=50)
    found = ratios(ours, theirs)
    assert (found["rollout"].median, found["rollout"].least, found["rollout"].most) == (40.0, 20.0, 60.0)
    assert (found["step"].median, found["step"].least, found["step"].most) == (10.0, 10.0, 20.0)
    assert ours.rest == [1.0, 3.0, 1.0] and ours.rates == [100.0] * 3


def test_the_table_says_whether_goals_are_reached() -> None:
    lines = told({"twofold": side([2.0], [1.0]), "TRL": side([10.0], [9.0])}, 10)
    assert any("step: twofold 5.00 times (5.00 to 5.00) TRL; goal 4 reached" in line for line in lines)
    assert any("rollout: twofold 9.00 times (9.00 to 9.00) TRL; goal 10 missed, 0.90 of it" in line for line in lines)
    assert lines[1].split()[-1] == "10.0", "the mean answer has 10 tokens"


@pytest.mark.parametrize(("norm", "reward", "same"), [(2.0, 0.5, True), (2.1, 0.5, False), (2.0, 0.8, False)])
def test_work_is_the_same_when_gradients_and_draws_are(norm: float, reward: float, same: bool) -> None:
    ours, theirs = side([1.0], [1.0]), side([1.0], [1.0], reward=reward, norm=norm)
    assert ("NOT THE SAME WORK" not in same_work(ours, theirs, 128)) is same
    assert alike(ours, theirs, 128) is (reward == 0.5)


@pytest.mark.parametrize("work", [QUICK, Work()], ids=["quick", "full"])
def test_prompts_have_as_many_tokens_as_are_said(work: Work, tmp_path: Path) -> None:
    folder = make("quick", tmp_path, work)
    texts = [json.loads(line)["prompt"] for line in (folder / prompts_file(work)).read_text().splitlines()]
    tokenizer = Tokenizer.load(folder)
    assert {len(tokenizer.encode(text)) for text in texts} == {work.length} and len(set(texts)) == work.prompts
    assert len(tokenizer.eos_ids) == 1024 // 64
    written = (folder / "model.safetensors").stat().st_mtime_ns
    assert make("quick", tmp_path, work) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == written, "written once"


def test_the_small_policy_has_the_bundled_models_shape() -> None:
    root = Path(__file__).resolve().parents[2]
    bundled = spec_from(json.loads((root / "twofold/assets/pybot/config.json").read_text()))
    small = spec_from(POLICIES["small"])
    assert (small.hidden, small.vocab, len(small.layers)) == (bundled.hidden, bundled.vocab, len(bundled.layers))


class Pipe:
    """What a runner tells."""

    def __init__(self) -> None:
        self.told: list[dict[str, Any]] = []

    def tell(self, message: dict[str, Any]) -> None:
        self.told.append(message)


def test_given_answers_come_once_each_and_in_the_prompts_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "benchmarks" / "peers"))
    from rolling import Steps, even

    pipe = Pipe()
    question = {"steps": 1, "given": [[[1, 2], [[3], [4, 4]]], [[5], [[6, 7]]]]}
    monkeypatch.setattr("sys.stdin", io.StringIO(json.dumps(question) + "\n"))
    steps = Steps(pipe)
    assert steps.wanted()
    prompts = [[5], [1, 2], [1, 2]]
    answers = steps.answers(prompts)
    assert answers == [[6, 7], [3], [4, 4]]
    steps.rolled(0.5, 0.25, prompts, answers)
    steps.done(loss=1.0)
    (told,) = pipe.told
    assert (told["tokens"], told["rollout"], told["told"]) == ([5], [0.5], [{"loss": 1.0}])
    assert told["rollouts"] == [[[5], [[6, 7]]], [[1, 2], [[3], [4, 4]]]]
    assert not steps.wanted(), "nobody asks any more"
    assert even([[2, 4, 5, 7], [1]]) == [0.5, 0.0]
