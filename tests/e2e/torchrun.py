"""torchrun as users start it: agents in process groups of their own, and the ranks that they started."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from twofold.train.journal import read_rows

LIMIT = 100.0
SHORT = "keep_alive_interval=1,keep_alive_max_attempt=8,last_call_timeout=1,is_host={host}"


class Agent:
    """One agent and its ranks. `elastic` is (port, first): one of 1 to 2 agents, of which the first holds the store.

    `paced` is (seconds, what): steps that long, and what goes wrong (`paced.py`).
    """

    def __init__(
        self, recipe: Path, changes: dict[str, Any], said: Path, *, ranks: int = 2, restarts: int = 3,
        elastic: tuple[int, bool] | None = None, paced: tuple[float, str] | None = None,
    ) -> None:  # fmt: skip
        where, env = ["--standalone"], {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
        if elastic:
            port, first = elastic
            conf = SHORT.format(host=int(first))
            where = ["--nnodes=1:2", "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}", f"--rdzv-conf={conf}"]
            where += ["--rdzv-id=test", "--local-addr=127.0.0.1"]
            env["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # torch 2.13 tells a joiner no address else
        command = ["-m", "twofold", "train"]
        if paced:
            command = [str(Path(__file__).with_name("paced.py")), *map(str, paced)]
        self._said = said
        with said.open("w") as out:
            self.process = subprocess.Popen(
                [
                    sys.executable, "-m", "torch.distributed.run", *where, f"--nproc-per-node={ranks}",
                    f"--max-restarts={restarts}", *command, str(recipe),
                    *(f"--set={key}={value}" for key, value in changes.items()),
                ],
                stdout=out, stderr=subprocess.STDOUT, start_new_session=True,
                env=os.environ | env,
            )  # fmt: skip

    def said(self) -> str:
        return self._said.read_text()

    def ranks(self) -> dict[int, int]:
        """Process id of each rank that lives, by its number."""
        found = {}
        for children in Path(f"/proc/{self.process.pid}/task").glob("*/children"):
            for pid in map(int, children.read_text().split()):
                env = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
                number = [line[5:] for line in env if line.startswith(b"RANK=")]
                if number:
                    found[int(number[0])] = pid
        return found

    def kill(self) -> None:
        """kill -9 to the agent and all that it started."""
        mine = self.ranks().values()
        os.killpg(self.process.pid, signal.SIGKILL)
        for pid in mine:  # each is in a session of its own
            os.kill(pid, signal.SIGKILL)

    def end(self) -> int:
        try:
            return self.process.wait(LIMIT)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"torchrun did not end:\n{self.said()}") from None


def until(agent: Agent, output: Path, step: int, what: str = "", saved: int = 0, other: Agent | None = None) -> None:
    """Wait for the record of a step, that the agent's ranks said `what`, and for the checkpoint of step `saved`.

    `other` is an agent that lives meanwhile, too; when the wait fails, what it said is told as well.
    """
    agents = [agent, other] if other else [agent]

    def told() -> str:
        return "\n--- the other:\n".join(it.said() for it in agents)

    ends = time.monotonic() + LIMIT
    while last_step(output) < step or what not in agent.said() or (saved and not kept(output, saved)):
        codes = [it.process.poll() for it in agents]
        assert codes == [None] * len(agents), f"torchrun ended with {codes} before step {step}:\n{told()}"
        assert time.monotonic() < ends, f"no step {step} in {LIMIT:g} s:\n{told()}"
        time.sleep(0.01)


def last_step(output: Path) -> int:
    """The newest step in a run's record."""
    return max((row["step"] for row in read_rows(output / "log.jsonl")), default=0)


def kept(output: Path, step: int) -> bool:
    """Whether a checkpoint is written, or a newer one."""
    names = [f"step-{n:08d}" for n in range(step, step + 200)]
    return any((output / "checkpoints" / name).exists() for name in names)
