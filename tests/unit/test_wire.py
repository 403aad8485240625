"""Frames between the front and the model's process: nothing lost, nothing believed."""

from __future__ import annotations

import random

import pytest

from twofold.core import RequestError, WorkerError
from twofold.engine.request import Output, Request, State, TokenOut
from twofold.engine.sampling import SamplingParams
from twofold.engine.stats import EngineStats
from twofold.serve import wire

PARAMS = SamplingParams(n=2, stop=["x", "é"], logit_bias={3: 1.5}, seed=2**64 - 1, allowed_token_ids=(1, 2), top_k=4)


def body(message: wire.ToWorker | wire.ToFront) -> bytes:
    frame = wire.pack(message)
    size = wire.length(frame[: wire.HEAD.size])
    assert size == len(frame) - wire.HEAD.size
    return frame[wire.HEAD.size :]


def test_a_request_crosses_whole() -> None:
    request = Request(id="r", prompt_ids=(1, 2), params=PARAMS, sample=1, priority=-3, salt="s", output_ids=[9])
    crossed = wire.for_worker(body(wire.Submit(**request.wire())))
    assert isinstance(crossed, wire.Submit)
    assert crossed.params == PARAMS and crossed.seed == 2**64 - 1
    assert (crossed.prompt_ids, crossed.output_ids, crossed.sample) == ((1, 2), [9], 1)
    assert crossed.seconds_left is None


@pytest.mark.parametrize(
    "message",
    [
        wire.Ready(max_len=8, vocab_size=9, max_running=1, block_size=16, blocks=2),
        wire.Outputs([Output("r", (TokenOut(5, -0.1, 1, ((5, -0.1), (6, -3.0))),), State.STOP, 5)], [("r", 0.5)]),
        wire.Outputs([Output("r", finish=State.ERROR, error="why", prompt=(TokenOut(1), TokenOut(2, -1.0)))]),
        wire.Stats(EngineStats(running=1, finished={"stop": 2})),
        wire.Beat(1.5),
        wire.Told("a1", what={"names": ["é"], "n": None, "x": 0.5}),
        wire.Told("a2", "why", {"kind": "RequestError"}),
        wire.Fatal("OSError", "gone"),
    ],
    ids=lambda message: type(message).__name__,
)
def test_what_the_worker_says_crosses_whole(message: wire.ToFront) -> None:
    assert wire.for_front(body(message)) == message


def test_a_question_crosses_whole() -> None:
    ask = wire.Ask("a1", "load", {"path": "/é", "deep": {"list": [1, 2.5, None]}})
    assert wire.for_worker(body(ask)) == ask


def test_sampling_limits_hold_on_the_other_side_too() -> None:
    request = Request(id="r", prompt_ids=(1,), params=SamplingParams(temperature=1.5))
    frame = body(wire.Submit(**request.wire()))
    with pytest.raises(RequestError, match="temperature"):
        wire.for_worker(frame.replace(b"temperature\xcb\x3f\xf8", b"temperature\xcb\x40\xf8"))


def test_a_peer_that_lies_is_an_error_and_nothing_else() -> None:
    rng = random.Random(0)
    good = body(wire.Submit(**Request(id="r", prompt_ids=(1, 2, 3), params=PARAMS).wire()))
    refused = 0
    for _ in range(3000):
        broken = bytearray(good)
        for _ in range(rng.randint(1, 8)):
            broken[rng.randrange(len(broken))] = rng.randrange(256)
        for read in (wire.for_worker, wire.for_front):
            try:
                read(bytes(broken[: rng.randint(1, len(broken))]))
            except (WorkerError, RequestError):
                refused += 1
    assert refused > 3000
    with pytest.raises(WorkerError):
        wire.for_front(b"\x80\x04\x95cos\nsystem\n")  # a pickle
    with pytest.raises(WorkerError, match="at most"):
        wire.length(wire.HEAD.pack(wire.MAX_FRAME + 1))
