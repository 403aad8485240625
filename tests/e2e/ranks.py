"""The ranks of a recipe's run as processes of this machine, told to die where a test wants it.

A server process imports torch once and forks them, so that each starts in milliseconds.
"""

from __future__ import annotations

import errno
import itertools
import json
import multiprocessing
import os
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from tests.ports import free_port

LIMIT = 120.0
_number = itertools.count()


class Run:
    """`world` ranks that train; what rank i says is in `said(i)`.

    `die` is (rank, n): kill -9 at its n-th file; with n = -1 its disk is full instead. `aligns`: as `twofold align`.
    """

    def __init__(
        self,
        recipe: Path,
        world: int,
        changes: dict[str, Any],
        die: tuple[int, int] | None = None,
        aligns: bool = False,
    ) -> None:
        processes = multiprocessing.get_context("forkserver")
        processes.set_forkserver_preload(["torch", "torch.distributed.fsdp", "twofold.train.launch"])
        port = free_port()
        number = next(_number)
        self.output = Path(changes["run.output"])
        self.output.mkdir(parents=True, exist_ok=True)
        self._told = [self.output / f"said-{number}-{rank}.txt" for rank in range(world)]
        self.ranks = [
            processes.Process(target=_rank, args=(rank, world, port, recipe, changes, die, self._told[rank], aligns))
            for rank in range(world)
        ]
        for process in self.ranks:
            process.start()

    def said(self, rank: int = 0) -> str:
        return self._told[rank].read_text() if self._told[rank].exists() else ""

    def until(self, step: int) -> None:
        """Wait for the record of a step."""
        ends = time.monotonic() + LIMIT
        while f'"step": {step},' not in _text(self.output / "log.jsonl"):
            alive = any(process.is_alive() for process in self.ranks)
            assert alive and time.monotonic() < ends, f"step {step} was not reached:\n{self.said()}"
            time.sleep(0.005)

    def saved(self, step: int) -> None:
        """Wait for a checkpoint, which is written behind the run's back."""
        ends = time.monotonic() + LIMIT
        while not (self.output / "checkpoints" / f"step-{step:08d}").exists():
            assert time.monotonic() < ends, f"step {step} was not saved:\n{self.said()}"
            time.sleep(0.005)

    def kill(self, *ranks: int, how: signal.Signals = signal.SIGKILL) -> None:
        """A signal to these ranks, or to all."""
        for rank in ranks or range(len(self.ranks)):
            pid = self.ranks[rank].pid
            assert pid is not None
            os.kill(pid, how)

    def end(self) -> list[int]:
        """Every rank's exit status; minus the signal that killed it."""
        ends = time.monotonic() + LIMIT
        for process in self.ranks:
            process.join(max(0.0, ends - time.monotonic()))
        late = [rank for rank, process in enumerate(self.ranks) if process.is_alive()]
        for rank in late:
            self.ranks[rank].kill()
        assert not late, f"ranks {late} did not end; rank 0 said:\n{self.said()}"
        return [process.exitcode or 0 for process in self.ranks]


def read_losses(run: Path) -> list[float]:
    """The loss of every step in a run's record."""
    rows = map(json.loads, (run / "log.jsonl").read_text().splitlines())
    return [row["loss"] for row in rows if "loss" in row]


def _text(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def _rank(
    rank: int,
    world: int,
    port: int,
    recipe: Path,
    changes: dict[str, Any],
    die: tuple[int, int] | None,
    said: Path,
    aligns: bool,
) -> None:
    from rich.console import Console

    from twofold.core import TwofoldError
    from twofold.train import launch

    local = {"LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in {"RANK": rank, "WORLD_SIZE": world, **local}.items()})
    with said.open("w", buffering=1) as out:
        sys.stdout = sys.stderr = out
        if die == (rank, -1):
            _fill_the_disk()
        elif die is not None and die[0] == rank:
            _die_at(die[1])
        course = None
        if aligns:
            from twofold.align.launch import Alignment

            course = Alignment()
        try:
            status = launch.run(recipe, changes, course=course, console=Console(file=out, highlight=False, width=200))
        except TwofoldError as error:
            print(error)
            status = 2
        except BaseException:
            traceback.print_exc()
            status = 3
    os._exit(status)


def _fill_the_disk() -> None:
    from twofold.train import saver

    def full(path: Path, items: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    saver.write_shard = full


def _die_at(call: int) -> None:
    """Kill this process at the n-th time that a file of a checkpoint is begun, hashed or flushed."""
    from twofold.train import checkpoint, saver

    left = itertools.count(call, -1)

    def mortal(work: Any) -> Any:
        def do(*args: Any) -> Any:
            if next(left) == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return work(*args)

        return do

    for module, name in ((checkpoint, "_flush"), (saver, "write_shard"), (saver, "note")):
        setattr(module, name, mortal(getattr(module, name)))
