"""Measuring on a shared, noisy machine: a claim is a ratio taken in one run, the sides in turn, medians and spread.

Also the sides themselves: this engine in this process, and a runner of any engine in a process of its own. A runner
that is not at its turn is stopped, threads that spin and all, so that nobody waits beside it.
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from workload import Workload

from twofold import Engine, EngineConfig, SamplingParams
from twofold.engine.request import Request
from twofold.models import Decoder
from twofold.platforms import bound_spin

HERE = Path(__file__).resolve().parent
PEERS = HERE / "peers"
PATIENCE = 900.0


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Median, least and most of some numbers."""

    median: float
    least: float
    most: float

    @staticmethod
    def of(values: Sequence[float]) -> Spread:
        return Spread(median=statistics.median(values), least=min(values), most=max(values))

    def text(self, unit: str, digits: int = 0) -> str:
        return f"{self.median:,.{digits}f} {unit} ({self.least:,.{digits}f} to {self.most:,.{digits}f})"


class Ours:
    """Twofold's engine on token ids; one engine for all turns, as a server would have."""

    def __init__(self, decoder: Decoder, config: EngineConfig) -> None:
        self.engine = Engine(decoder, config, eos_ids=())
        self.waste = 0.0

    def run(self, work: Workload, turn: int) -> tuple[float, list[list[int]]]:
        """Seconds for the whole workload, all requests there at once, and the new tokens of each."""
        found: dict[str, list[int]] = {}
        start = time.perf_counter()
        for i, (prompt, new) in enumerate(zip(work.prompts, work.outputs, strict=True)):
            params = SamplingParams(temperature=0.0, max_tokens=new, ignore_eos=True)
            name = f"{turn}-{i}"
            found[name] = []
            self.engine.submit(Request(id=name, prompt_ids=prompt, params=params))
        while self.engine.has_work:
            for output in self.engine.step():
                found[output.request_id] += [token.id for token in output.tokens]
            self.waste = max(self.waste, self.engine.stats().waste)
        return time.perf_counter() - start, list(found.values())


class RunnerEnded(Exception):
    """A runner is gone; the message is the last thing it said that looks like a reason."""


class Runner:
    """A script of `peers/` in a process of its own, spoken to in JSON lines and stopped between its turns."""

    def __init__(self, command: Sequence[str], env: Mapping[str, str] | None = None) -> None:
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed by `close`)
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=env,
            start_new_session=True,
        )
        self._stopped = False
        self.name = ""

    def ready(self) -> str:
        """Wait until it has loaded; its name and settings.

        Raises:
            RunnerEnded: it could not, and why.
        """
        self.name = str(self.answer()["ready"])
        return self.name

    def ask(self, work: Workload, **more: Any) -> dict[str, Any]:
        """One turn: its answer to a workload, whose lengths are checked.

        Raises:
            RunnerEnded: it fell over, or found other than was asked for.
        """
        self.send(work.question() | more)
        answer = self.answer()
        if (lengths := tuple(map(len, answer["tokens"]))) != work.outputs:
            raise RunnerEnded(f"it found {sum(lengths)} tokens where {work.tokens_out} were asked for")
        return answer

    def send(self, question: Mapping[str, Any]) -> None:
        """Let it run on, and ask it. Raises RunnerEnded."""
        self._signal(signal.SIGCONT)
        assert self._process.stdin is not None
        try:
            print(json.dumps(question), file=self._process.stdin, flush=True)
        except BrokenPipeError:
            raise RunnerEnded(self._reason()) from None

    def answer(self, *, stop: bool = True) -> dict[str, Any]:
        """Wait for a line of it, and stop it there. Raises RunnerEnded."""
        assert self._process.stdout is not None
        watchdog = threading.Timer(PATIENCE, self._process.kill)
        watchdog.start()
        line = self._process.stdout.readline()
        watchdog.cancel()
        if not line:
            self._process.wait()
            raise RunnerEnded(self._reason())
        if stop:
            self.stop()
        answer: dict[str, Any] = json.loads(line)
        return answer

    def stop(self) -> None:
        """Its turn is over: none of its threads runs until it is asked again."""
        self._signal(signal.SIGSTOP)

    def _signal(self, what: signal.Signals) -> None:
        if self._stopped == (what == signal.SIGCONT):
            os.killpg(self._process.pid, what)
            self._stopped = not self._stopped

    def _reason(self) -> str:
        self._log.seek(0)
        lines = [line.strip() for line in self._log.read().splitlines() if line.strip()]
        telling = [line for line in lines if "Error" in line or "error:" in line]
        return (telling or lines or [f"exit code {self._process.returncode}, no word"])[-1][:200]

    def close(self) -> None:
        """End it, whatever it is doing."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout, self._log):
            if pipe is not None:
                pipe.close()


def loaded(script: str, python: str, model: Path, threads: int) -> Runner:
    """A script of `peers/` with its model; ends the benchmark with the reason where it cannot start."""
    command = [python, str(PEERS / script), "--model", str(model), "--threads", str(threads)]
    peer = Runner(command, plain_environment(threads))
    try:
        peer.ready()
    except RunnerEnded as trouble:
        raise SystemExit(f"the peer did not start: {trouble}") from None
    return peer


def plain_environment(threads: int, **more: str) -> dict[str, str]:
    """What a peer's process sees: no PYTHONPATH of ours, how many threads to use, and our bound on how long they spin.

    On a quiet machine the bound changes nothing; on a busy one a peer without it would look many times slower than it
    is.
    """
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    bound_spin(kept)
    return kept | {"OMP_NUM_THREADS": str(threads)} | more


def same_tokens(ours: Sequence[Sequence[int]], theirs: Sequence[Sequence[int]]) -> float:
    """The share of requests whose greedy tokens are equal on both sides."""
    return statistics.mean(list(a) == list(b) for a, b in zip(ours, theirs, strict=True))


def use_threads(threads: int) -> None:
    torch.set_num_threads(threads)
