"""A model's process without a model: the real `Worker` loop around an engine whose next token is a hash.

The settings that come in the `engine` table of wire.Start:
    seconds     how long a step takes
    poison      a prompt that starts with this id kills the process when it is first run
    forgetful   a new process refuses to be told anything
    load_error  the name of an error to raise while loading; "exit" leaves without a word
"""

from __future__ import annotations

import hashlib
import os
import sys
import time
from array import array

from twofold.core import errors
from twofold.engine.request import Output, Request, State, TokenOut
from twofold.engine.stats import EngineStats
from twofold.engine.vectors import Abilities, Pooled, Pooling
from twofold.serve import wire, worker

VOCAB = 500
MAX_LEN = 512
BLOCK = 16
WIDTH = 3
LABELS = ("bad", "fair", "good")
TASKS = ("embed", "classify", "token_embed", "token_classify")


def next_token(request: Request) -> int:
    key = f"{request.seed}:{request.sample}:{request.num_tokens}:{request.token_ids[-1]}"
    return 1 + int.from_bytes(hashlib.sha256(key.encode()).digest()[:4]) % (VOCAB - 1)


def pooled(request: Request, asked: Pooling) -> Pooled:
    """A vector, or one of each token, of what the ids hash to."""
    width = asked.dimensions or WIDTH
    rows = len(request.prompt_ids) if asked.task.startswith("token") else 1
    key = hashlib.sha256(repr(request.prompt_ids).encode()).digest()
    numbers = array("f", [key[i % 32] / 255 for i in range(rows * width)])
    return Pooled((rows, width) if rows > 1 or asked.task.startswith("token") else (width,), numbers.tobytes())


class FakeEngine:
    def __init__(self, settings: dict[str, object]) -> None:
        self.seconds = float(settings.get("seconds", 0.002))  # type: ignore[arg-type]
        self.poison = settings.get("poison")
        self.running: dict[str, Request] = {}
        self.steps = 0

    @property
    def has_work(self) -> bool:
        return bool(self.running)

    def submit(self, request: Request) -> None:
        if request.num_tokens > MAX_LEN:
            raise errors.RequestError("too long", "prompt")
        self.running[request.id] = request

    def abort(self, request_id: str) -> None:
        self.running.pop(request_id, None)

    def step(self) -> list[Output]:
        time.sleep(self.seconds)
        self.steps += 1
        return [self.advance(request) for request in list(self.running.values())]

    def advance(self, request: Request) -> Output:
        if request.prompt_ids[0] == self.poison:
            os._exit(9)
        if request.state is State.WAITING:
            request.move(State.RUNNING)
        if request.pooling is not None:
            del self.running[request.id]
            return Output(request.id, finish=State.STOP, pooled=pooled(request, request.pooling))
        token = next_token(request)
        request.output_ids.append(token)
        limit = request.params.max_tokens or MAX_LEN - len(request.prompt_ids)
        finish = State.LENGTH if len(request.output_ids) >= limit else None
        if finish:
            del self.running[request.id]
        return Output(request.id, (TokenOut(token, -1.0),), finish)


class Loaded:
    def __init__(self, settings: dict[str, object]) -> None:
        self.engine = FakeEngine(settings)
        self.names: list[str] = []
        self.forgetful = bool(settings.get("forgetful"))
        self.verbs = {
            "echo": lambda **what: what,
            "fail": self.fail,
            "die": lambda: os._exit(9),
            "sleep": self.sleep,
            "learn": self.learn,
            "names": lambda: {"names": self.names, "pid": os.getpid()},
            "strange": lambda: {"what": object()},
        }
        self.ready = wire.Ready(max_len=MAX_LEN, vocab_size=VOCAB, max_running=8, block_size=BLOCK, blocks=64,
                                abilities=Abilities(tasks=TASKS, width=WIDTH, labels=LABELS))  # fmt: skip

    def fail(self, kind: str) -> dict[str, object]:
        raise getattr(errors, kind, RuntimeError)(f"no {kind} today")

    def sleep(self, seconds: float) -> dict[str, object]:
        time.sleep(seconds)
        return {}

    def learn(self, name: str, first: bool = False) -> dict[str, object]:
        if self.forgetful and not first:
            raise errors.CheckpointError(f"no {name} here any more")
        self.names.append(name)
        return {"learned": name}

    def close(self) -> None:
        pass

    def stats(self) -> EngineStats:
        used = sum(-(-r.num_tokens // BLOCK) for r in self.engine.running.values())
        return EngineStats(running=len(self.engine.running), blocks=64, blocks_used=used, steps=self.engine.steps)


def load(start: wire.Start) -> Loaded:
    kind = start.engine.get("load_error")
    if kind == "exit":
        os._exit(3)
    if kind:
        raise getattr(errors, str(kind))("this checkpoint cannot be")
    return Loaded(start.engine)


if __name__ == "__main__":
    worker.run(int(sys.argv[1]), load)
