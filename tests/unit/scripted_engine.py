"""A model's process that says what it is told: request with seed N, sample S says answer N + S of the file $SCRIPT.

The file is a JSON list of lists of ids, each answer's last being an end of text; three ids come a step. Beyond its end
(a request without a seed, which gets one by chance) the first is said.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from twofold.engine.request import Output, Request, State, TokenOut
from twofold.engine.stats import EngineStats
from twofold.serve import wire, worker

VOCAB, MAX_LEN, STEP = 1000, 4096, 3


class ScriptedEngine:
    def __init__(self) -> None:
        self.answers: list[list[int]] = json.loads(Path(os.environ["SCRIPT"]).read_text())
        self.running: dict[str, Request] = {}

    @property
    def has_work(self) -> bool:
        return bool(self.running)

    def submit(self, request: Request) -> None:
        self.running[request.id] = request

    def abort(self, request_id: str) -> None:
        self.running.pop(request_id, None)

    def step(self) -> list[Output]:
        return [self.advance(request) for request in list(self.running.values())]

    def advance(self, request: Request) -> Output:
        if request.state is State.WAITING:
            request.move(State.RUNNING)
        number = request.seed + request.sample
        answer = self.answers[number if number < len(self.answers) else 0]
        said = len(request.output_ids)
        limit = request.params.max_tokens or MAX_LEN
        new = answer[said : min(said + STEP, limit)]
        request.output_ids.extend(new)
        finish = None
        if said + len(new) >= len(answer):
            finish = State.STOP
        elif said + len(new) >= limit:
            finish = State.LENGTH
        if finish:
            del self.running[request.id]
        return Output(request.id, tuple(TokenOut(token, -1.0) for token in new), finish)


class Loaded:
    def __init__(self) -> None:
        self.engine = ScriptedEngine()
        self.ready = wire.Ready(max_len=MAX_LEN, vocab_size=VOCAB, max_running=8, block_size=16, blocks=1024)

    def close(self) -> None:
        pass

    def stats(self) -> EngineStats:
        return EngineStats(running=len(self.engine.running), blocks=1024)


if __name__ == "__main__":
    worker.run(int(sys.argv[1]), lambda start: Loaded())
