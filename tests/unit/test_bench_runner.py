"""A runner is spoken to in lines of JSON, stands still between its turns, and says why when it falls over."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from turns import PEERS, Runner, RunnerEnded
from workload import Workload

ENGINE = """
import sys
sys.path.insert(0, {peers!r})
from protocol import Channel, arguments
args = arguments("A toy.").parse_args()
channel = Channel()
print("engines chat on standard output")
def run(question):
    if question.get("fall"):
        raise ValueError("this engine has had enough")
    return [[0] * (n + question.get("extra", 0)) for n in question["outputs"]]
channel.serve("toy of " + str(args.threads), run, more=lambda: {{"waste": 0.25}})
"""
WORK = Workload(prompts=((1, 2), (3,)), outputs=(3, 4))
Start = Callable[[], Runner]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    script = tmp_path / "toy.py"
    script.write_text(ENGINE.format(peers=str(PEERS)))
    made: list[Runner] = []

    def begin() -> Runner:
        made.append(Runner([sys.executable, str(script), "--model", "m", "--threads", "2"]))
        return made[-1]

    yield begin
    for runner in made:
        runner.close()


def state(runner: Runner) -> str:
    """The process' state letter; a signal takes a moment to arrive."""
    time.sleep(0.05)
    return Path(f"/proc/{runner._process.pid}/stat").read_text().rsplit(")", 1)[1].split()[0]


def test_it_answers_and_stands_still_between(start: Start) -> None:
    runner = start()
    assert runner.ready() == "toy of 2"
    for _ in range(2):
        answer = runner.ask(WORK)
        assert [len(row) for row in answer["tokens"]] == [3, 4]
        assert answer["seconds"] >= 0 and answer["waste"] == 0.25 and answer["peak_mib"] > 0
        if sys.platform == "linux":
            assert state(runner) == "T"


def test_falling_over_has_a_reason(start: Start) -> None:
    runner = start()
    runner.ready()
    with pytest.raises(RunnerEnded, match="this engine has had enough"):
        runner.ask(WORK, fall=True)


def test_wrong_lengths_are_no_result(start: Start) -> None:
    runner = start()
    runner.ready()
    with pytest.raises(RunnerEnded, match="found 9 tokens where 7"):
        runner.ask(WORK, extra=1)


def test_one_that_never_starts_has_a_reason() -> None:
    runner = Runner([sys.executable, "-c", "import no_such_engine"])
    with pytest.raises(RunnerEnded, match="no_such_engine"):
        runner.ready()
    runner.close()


def test_closing_ends_one_that_stands_still(start: Start) -> None:
    runner = start()
    runner.ready()
    pid = runner._process.pid
    runner.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
