"""Who trains in the training benchmark, and an engine as a group of ranks, each a process, spoken to together."""

from __future__ import annotations

import os
import socket
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train_shapes import Shape
from turns import PEERS, Runner, RunnerEnded, plain_environment

OURS = "twofold"


@dataclass(frozen=True, kw_only=True)
class Engine:
    """A way to train: its runner in `peers/`, the environment (of peers/build.py) it runs in, and its ZeRO stage."""

    name: str
    runner: str
    home: str = "deepspeed"  # "" is this very Python
    flags: tuple[str, ...] = ()
    stage: int = 0

    @property
    def ours(self) -> bool:
        return not self.home


_RUNNER = "train_twofold.py"
OUR_ENGINES = (
    *(
        Engine(name=f"{OURS} {stage}", runner=_RUNNER, home="", flags=("--zero", str(stage)), stage=stage)
        for stage in (0, 1, 2, 3)
    ),
    Engine(
        name=f"{OURS} disk",
        runner=_RUNNER,
        home="",
        flags=("--zero", "3", "--disk", "optimizer", "gradients"),
        stage=3,
    ),
)
PEER_ENGINES = (
    Engine(name="DDP", runner="train_torch.py", flags=("--engine", "ddp")),
    Engine(name="FSDP2", runner="train_torch.py", flags=("--engine", "fsdp2"), stage=3),
    Engine(name="DeepSpeed 1", runner="train_deepspeed.py", flags=("--stage", "1"), stage=1),
    Engine(name="DeepSpeed 2", runner="train_deepspeed.py", flags=("--stage", "2"), stage=2),
    Engine(name="DeepSpeed 3", runner="train_deepspeed.py", flags=("--stage", "3"), stage=3),
    Engine(name="Trainer", runner="train_transformers.py"),
)


def chosen(ranks: int, peers: list[str]) -> list[Engine]:
    """Ours and the peers of a run; on one rank our stages are all the same."""
    ours = (OUR_ENGINES[0], OUR_ENGINES[-1]) if ranks == 1 else OUR_ENGINES
    return [*ours, *(engine for engine in PEER_ENGINES if engine.name in peers)]


@dataclass(frozen=True, kw_only=True)
class Turn:
    """What one turn of a group came to: the slowest rank's seconds, the mean loss of each step by its number, the most
    memory of a rank in MiB."""

    seconds: float
    losses: dict[int, float]
    peak_mib: float

    @staticmethod
    def of(answers: list[dict[str, Any]]) -> Turn:
        """Of all ranks' answers; each rank tells the mean loss of its own targets, and all have as many."""
        steps = zip(*(answer["losses"] for answer in answers), strict=True)
        first = answers[0]["first"]
        return Turn(
            seconds=max(answer["seconds"] for answer in answers),
            losses={first + at: sum(values) / len(values) for at, values in enumerate(steps)},
            peak_mib=max(answer["peak_mib"] for answer in answers),
        )


class Group:
    """The ranks of an engine, started together and stopped between turns."""

    def __init__(self, engine: Engine, model: Path, shape: Shape, ranks: int, threads: int, place: Path) -> None:
        python = str(place / engine.home / "bin" / "python") if engine.home else sys.executable
        command = [python, str(PEERS / engine.runner), "--model", str(model), "--threads", str(threads)]
        command += ["--length", str(shape.length), "--micro", str(shape.micro), *engine.flags]
        port = free_port()
        self.name, self.warm = engine.name, False
        self._ranks: list[Runner] = []
        for rank in range(ranks):
            self._ranks.append(Runner(command, environment(engine, threads, rank, ranks, port)))

    def ready(self) -> str:
        """Wait until all have loaded; the engine's version and settings. Raises RunnerEnded."""
        try:
            told = [str(rank.answer(stop=False)["ready"]) for rank in self._ranks]
        except RunnerEnded as reason:
            raise RunnerEnded(f"{self.name}: {reason}") from None
        return told[0]

    def turn(self, steps: int) -> Turn:
        """Let it make some steps; after the first of all it is warm. Raises RunnerEnded when a rank falls over."""
        for rank in self._ranks:
            rank.send({"steps": steps})
        answers = [rank.answer(stop=False) for rank in self._ranks]
        for rank in self._ranks:
            rank.stop()
        self.warm = True
        return Turn.of(answers)

    def close(self) -> None:
        for rank in self._ranks:
            rank.close()


def environment(engine: Engine, threads: int, rank: int, ranks: int, port: int) -> dict[str, str]:
    """What one rank's process sees: what torchrun would tell it, and for ours this package."""
    here = str(Path(__file__).resolve().parents[1])
    paths = os.pathsep.join([here, *filter(None, [os.environ.get("PYTHONPATH")])])
    told = {"RANK": rank, "WORLD_SIZE": ranks, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": ranks, "MASTER_PORT": port}
    more = {name: str(value) for name, value in told.items()} | ({"PYTHONPATH": paths} if engine.ours else {})
    more |= {"MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo", "DS_ACCELERATOR": "cpu"}
    return plain_environment(threads, **more)


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
