"""Measuring on a shared, noisy machine: a claim is a ratio taken in one run, the two sides in turn, medians and spread.

Also the two sides themselves: this engine in this process, and a peer in a process of its own.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from workload import Workload

from twofold import Engine, EngineConfig, SamplingParams
from twofold.engine.request import Request
from twofold.models import Decoder

HERE = Path(__file__).resolve().parent


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


class Peer:
    """A peer script in a process of its own, spoken to in JSON lines."""

    def __init__(self, python: str, script: str, model: Path, threads: int) -> None:
        env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"OMP_NUM_THREADS": str(threads)}
        command = [python, str(HERE / "peers" / script), "--model", str(model), "--threads", str(threads)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=env
        )
        self.name = str(self._answer()["ready"])

    def run(self, work: Workload, batch: int, order: str) -> tuple[float, list[list[int]]]:
        ask = {"prompts": work.prompts, "outputs": work.outputs, "batch": batch, "order": order}
        assert self.process.stdin is not None
        print(json.dumps(ask), file=self.process.stdin, flush=True)
        answer = self._answer()
        return float(answer["seconds"]), answer["tokens"]

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"the peer ended with exit code {self.process.wait()}; run it by hand to see why")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=30)


def same_tokens(ours: list[list[int]], theirs: list[list[int]]) -> float:
    """The share of requests whose greedy tokens are equal on both sides."""
    return statistics.mean(a == b for a, b in zip(ours, theirs, strict=True))


def use_threads(threads: int) -> None:
    torch.set_num_threads(threads)
