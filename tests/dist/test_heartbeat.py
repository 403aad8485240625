"""A rank that sleeps is found by its own and the others' heartbeat: one report, with stacks and the collective."""

from __future__ import annotations

import threading
import time
from dataclasses import asdict
from pathlib import Path

import pytest
from test_saver import assembled
from test_zero import batch
from world import run_ranks

from twofold.parallel import Mesh, ParallelConfig, watch
from twofold.parallel.layout import lay_out
from twofold.train import heartbeat
from twofold.train.heartbeat import HUNG, Heartbeat

AXES = [ParallelConfig(zero=3), ParallelConfig(tp=2), ParallelConfig(sp=2)]


def test_a_sleeping_rank(tmp_path: Path) -> None:
    told = run_ranks(2, _sleeps, tmp_path)
    assert told == [[HUNG], [HUNG]], "every rank ends, once"
    report = (tmp_path / "one" / "report.txt").read_text()
    first, second, *_ = report.splitlines()
    assert first.startswith("the run hangs: rank ") and first.endswith("s in the pass of step 4")
    assert second == (
        "rank 0 waits in all_reduce #4 [1] fp64 on zero, to which rank 1 has not come "
        "(its last there is all_reduce #3 [1] fp64)"
    )
    assert "rank 0: the pass of step 4" in report and "rank 1: the pass of step 4" in report
    assert "in _asleep" in report and "thread MainThread" in report
    assert not list((tmp_path / "one").glob(".rank-*"))


def _sleeps(rank: int, folder: Path) -> list[int]:
    mesh = Mesh(lay_out(ParallelConfig(zero=3), 2), rank)
    ended: list[int] = []
    gone = threading.Event()

    def leave(status: int) -> None:
        ended.append(status)
        gone.set()
        raise SystemExit  # the thread's own end, in place of the process's

    heartbeat.os._exit = leave  # type: ignore[attr-defined,assignment]
    heart = Heartbeat(folder, mesh, 1.0, "one")
    with heart:
        for step in range(4):
            heart.beat(step, "the pass")
            if rank == 1 and step == 3:
                _asleep(folder / "one" / "report.txt")
            mesh.sum("world", 1.0)
        gone.wait(20)
    mesh.wait()
    return ended


def _asleep(until: Path) -> None:
    while not until.exists():
        time.sleep(0.02)


def test_a_slow_but_living_run_is_let_alone(tmp_path: Path) -> None:
    run_ranks(2, _slow, tmp_path)
    assert not (tmp_path / "two").exists()


def _slow(rank: int, folder: Path) -> None:
    mesh = Mesh(lay_out(ParallelConfig(zero=3), 2), rank)
    with Heartbeat(folder, mesh, 0.4, "two") as heart:
        heart.beat(0, "the pass")
        time.sleep(1.2 * rank)  # the first may take longer
        for step in range(1, 4):
            heart.beat(step, "the pass")
            with heart.apart("the samples"):
                time.sleep(1.0 * (rank == 0))
            mesh.sum("world", 1.0)


@pytest.mark.parametrize("parallel", AXES, ids=["zero", "tp", "sp"])
def test_the_recorder_sees_whole_steps(tmp_path: Path, parallel: ParallelConfig) -> None:
    """Of FSDP, of tensor and of sequence parallel; and ranks that did the same steps do not differ."""
    told = run_ranks(2, _steps, parallel, tmp_path)
    calls = {rank: [watch.Call.read(row) for row in rows] for rank, (rows, _) in enumerate(told)}
    groups = {name: watch.Group(name=axis, ranks=tuple(ranks)) for name, (axis, ranks) in told[0][1].items()}
    names = {call.name for call in calls[0]}  # gloo makes a reduce-scatter of an all-reduce, and says so
    assert names >= ({"all_gather", "all_reduce"} if parallel.zero == 3 else {"all_reduce"}), names
    assert len(calls[0]) > 10 and {group.ranks for group in groups.values()} >= {(0, 1)}
    assert watch.first_difference(calls, groups) is None
    place = next(n for n, call in enumerate(calls[1]) if call.group in groups and n > 4)
    fewer = {0: calls[0], 1: [call for n, call in enumerate(calls[1]) if n != place]}
    found = watch.first_difference(fewer, groups)
    assert found and f"{calls[1][place].name} #{calls[1][place].number}" in found


def _steps(rank: int, parallel: ParallelConfig, folder: Path) -> tuple[list[dict], dict]:
    trainer = assembled(rank, 2, parallel, folder)
    for step in range(2):
        trainer.step(batch(step))
    trainer.mesh.wait()
    rows = [asdict(call) for call in watch.calls()]
    return rows, {name: (group.name, group.ranks) for name, group in trainer.mesh.groups().items()}
