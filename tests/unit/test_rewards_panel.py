"""Panel: functions in processes of their own, in three shapes, and everything that can go wrong with one."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from twofold.align.rewards import Judgement, Panel, RewardConfig
from twofold.core import ConfigError

FUNCTIONS = """
import asyncio, os, sys, time

def trl(prompts, completions, completion_ids, answer, trainer_state, log_extra, log_metric, **kwargs):
    log_metric("seen", len(prompts))
    log_extra("size", [len(c) for c in completions])
    return [trainer_state.global_step + float(len(ids)) if a else None for ids, a in zip(completion_ids, answer)]

async def waits(completions, **kwargs):
    await asyncio.sleep(0.01)
    return [float(len(c)) for c in completions]

def short(completions):
    return [0.25] * len(completions)

def verl(data_source, solution_str, ground_truth, extra_info=None):
    if solution_str == "boom":
        raise ValueError("no such\\nsolution")
    return {"score": float(solution_str == ground_truth), "length": len(solution_str)}

def openrlhf(queries, prompts, labels, **kwargs):
    right = [float(q == p + str(a)) for q, p, a in zip(queries, prompts, labels)]
    return {"rewards": right, "scores": right, "extra_logs": {"queries": [len(q) for q in queries]}}

def raises(completions, **kwargs):
    raise KeyError("a column that is not there")

def hangs(completions, **kwargs):
    if completions[0] == "hang":
        time.sleep(60)
    return [1.0] * len(completions)

def nan(completions, **kwargs):
    return [float("nan"), float("inf"), 1.0][: len(completions)]

def count(completions, **kwargs):
    return [1.0]

def wrong(completions, **kwargs):
    return {"rewards": 1}

def dies(completions, **kwargs):
    print("about to go", file=sys.stderr)
    if completions[0] == "die":
        os._exit(3)
    return [2.0] * len(completions)

def leaves(completions, **kwargs):
    sys.exit(0)

def prints(completions, **kwargs):
    print("{garbage" * 100_000)
    sys.stderr.write("more " * 100_000)
    os.write(1, b"\\x00\\xff" * 1000)
    return [3.0] * len(completions)

def floods(completions, log_extra, **kwargs):
    log_extra("huge", ["x" * 300_000_000] + [""] * (len(completions) - 1))
    return [1.0] * len(completions)
"""


@pytest.fixture(scope="module")
def functions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rewards") / "functions.py"
    path.write_text(FUNCTIONS)
    return path


@pytest.fixture
def panel(functions: Path) -> Iterator[Any]:
    made: list[Panel] = []

    def make(*names: str, models: dict[str, Any] | None = None, **options: Any) -> Panel:
        configs = [RewardConfig(kind="function", name=n, path=f"{functions}:{n}", **options) for n in names]
        made.append(Panel([*configs, *(RewardConfig(kind="model", model=m, name=m) for m in models or {})], models))
        return made[-1]

    yield make
    for each in made:
        each.close()


def score(panel: Panel, *completions: str, step: int = 0, **columns: list[Any]) -> Judgement:
    count = len(completions)
    return panel.score(["p"] * count, list(completions), [[1, 2]] * count, columns, step=step)


def test_trl_in_full_and_only_what_a_signature_takes(panel: Any) -> None:
    said = score(panel("trl", "waits", "short"), "a", "bcd", step=5, answer=["x", ""], other=[1, 2])
    assert said.parts == {"trl": [7.0, None], "waits": [1.0, 3.0], "short": [0.25, 0.25]}
    assert said.totals == [8.25, 3.25]
    assert said.metrics == {"trl.seen": 2.0} and said.extra == {"trl.size": [1, 3]}
    assert said.notes == [] and said.fault_counts == {"trl": 0, "waits": 0, "short": 0}
    assert said.means == {"trl": 7.0, "waits": 2.0, "short": 0.25}


def test_verl_and_openrlhf_shapes(functions: Path) -> None:
    rows = {"data_source": ["m"] * 3, "reward_model": [{"ground_truth": "4"}] * 3, "label": ["4", "5", "x"]}
    configs = [
        RewardConfig(kind="function", name=shape, path=f"{functions}:{shape}", interface=shape)  # type: ignore[arg-type]
        for shape in ("verl", "openrlhf")
    ]
    with Panel(configs) as panel:
        said = score(panel, "4", "5", "boom", **rows)
    assert said.parts == {"verl": [1.0, 0.0, None], "openrlhf": [1.0, 1.0, 0.0]}
    assert said.metrics == {"verl.length": 1.0, "openrlhf.queries": 3.0}
    assert dict(said.faults["verl"]) == {"raised": 1}
    assert said.notes == ["reward 'verl' raised ValueError: no such solution (functions.py:18) (1 completions)"]


def test_faults_are_named_counted_and_told_once(panel: Any) -> None:
    judges = panel("raises", "nan", "count", "wrong", "leaves", "short")
    said = score(judges, "a", "b")
    assert {name: dict(reasons) for name, reasons in said.faults.items()} == {
        "raises": {"raised": 2},
        "nan": {"not finite": 2},
        "count": {"count": 2},
        "wrong": {"type": 2},
        "leaves": {"raised": 2},
        "short": {},
    }
    assert said.totals == [0.25, 0.25]
    assert len(said.notes) == 5 and not any("\n" in note for note in said.notes)
    assert "reward 'raises' raised KeyError" in said.notes[0] and "(functions.py:" in said.notes[0]
    again = score(judges, "a", "b")
    assert again.notes == [] and again.faults == said.faults


def test_a_hang_is_killed_and_the_next_batch_is_judged(panel: Any) -> None:
    judges = panel("hangs", "short", timeout=1.0)
    assert score(judges, "ok").parts["hangs"] == [1.0]
    before = judges.pids()["hangs"]
    start = time.monotonic()
    said = score(judges, "hang", "b")
    assert time.monotonic() - start < 5
    assert said.parts == {"hangs": [None, None], "short": [0.25, 0.25]}
    assert dict(said.faults["hangs"]) == {"timeout": 2} and "killed after 1 s" in said.notes[0]
    with pytest.raises(ProcessLookupError):
        os.kill(before, 0)
    assert score(judges, "ok").parts["hangs"] == [1.0]
    assert judges.pids()["hangs"] != before


def test_a_death_is_told_with_its_last_words(panel: Any) -> None:
    judges = panel("dies")
    said = score(judges, "die")
    assert said.totals == [None] and dict(said.faults["dies"]) == {"died": 1}
    assert said.notes == ["reward 'dies' died (exit status 3), its last words: about to go (1 completions)"]
    assert score(judges, "live").totals == [2.0]


def test_what_a_function_prints_is_not_its_answer(panel: Any) -> None:
    assert score(panel("prints"), "a", "b").parts == {"prints": [3.0, 3.0]}


def test_an_answer_too_large_is_an_error(panel: Any) -> None:
    said = score(panel("floods"), "a")
    assert dict(said.faults["floods"]) == {"too large": 1} and said.totals == [None]


def test_what_cannot_start_is_told(panel: Any, functions: Path) -> None:
    said = score(panel("waitz"), "a")
    assert "unknown function 'waitz': did you mean 'waits'?" in said.notes[0]
    assert dict(said.faults["waitz"]) == {"start": 1}
    with Panel([RewardConfig(kind="function", path="no.such.module:f")]) as other:
        assert "cannot start: ModuleNotFoundError" in score(other, "a").notes[0]


def test_rewards_work_at_the_same_time(functions: Path) -> None:
    code = "import time\ndef f(completions):\n    time.sleep(1.0)\n    return [1.0] * len(completions)\n"
    (functions.parent / "sleeps.py").write_text(code)
    path = f"{functions.parent / 'sleeps.py'}:f"
    with Panel([RewardConfig(kind="function", name=f"r{i}", path=path) for i in range(4)]) as panel:
        score(panel, "a")
        start = time.monotonic()
        assert score(panel, "a").totals == [4.0]
        assert time.monotonic() - start < 3.0  # one after the other: 4


def test_weights_and_models(functions: Path) -> None:
    def model(prompts: Any, completions: Any, completion_ids: Any, columns: Any) -> list[float]:
        if completions[0] == "oom":
            raise MemoryError("none left")
        return [float(len(ids)) for ids in completion_ids]

    configs = [
        RewardConfig(kind="function", path=f"{functions}:short", weight=4.0),
        RewardConfig(kind="model", model="quality", weight=-1.0),
    ]
    with Panel(configs, {"quality": model}) as panel:
        assert score(panel, "a", "b").totals == [-1.0, -1.0]
        said = score(panel, "oom", "b")
        assert said.totals == [1.0, 1.0] and dict(said.faults["model"]) == {"raised": 2}
    with pytest.raises(ConfigError, match="unknown reward model 'quality': did you mean 'qualities'"):
        Panel(configs, {"qualities": model})


def test_a_batch_must_be_of_one_length_and_may_be_empty(panel: Any) -> None:
    judges = panel("short")
    with pytest.raises(ConfigError, match="'answer' has 1 entries for 2 completions"):
        score(judges, "a", "b", answer=["x"])
    assert score(judges).totals == []
    said = score(judges, "a", odd=[object()])
    assert dict(said.faults["short"]) == {"columns": 1} and "not JSON" in said.notes[0]


def test_close_leaves_no_process(panel: Any) -> None:
    judges = panel("short", "waits")
    score(judges, "a")
    pids = judges.pids()
    assert len(pids) == 2
    judges.close()
    for pid in pids.values():
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
