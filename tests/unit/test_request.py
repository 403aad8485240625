"""Requests and their settings: legal moves, checked numbers, names that say what is wrong; and the engine's dials."""

import math

import pytest

from twofold.core import ConfigError, RequestError, StateError
from twofold.engine.config import EngineConfig
from twofold.engine.request import Request, State
from twofold.engine.sampling import SamplingParams


def request(**fields):
    return Request(id="r", prompt_ids=(1, 2), params=SamplingParams(), **fields)


LEGAL = {
    (State.WAITING, State.RUNNING),
    (State.WAITING, State.STOP),
    (State.WAITING, State.LENGTH),
    (State.RUNNING, State.PREEMPTED),
    (State.RUNNING, State.STOP),
    (State.RUNNING, State.LENGTH),
    (State.PREEMPTED, State.RUNNING),
} | {
    (live, end)
    for live in (State.WAITING, State.RUNNING, State.PREEMPTED)
    for end in (State.ABORT, State.TIMEOUT, State.ERROR)
}


@pytest.mark.parametrize("source", State)
@pytest.mark.parametrize("target", State)
def test_only_the_drawn_moves_are_legal(source, target):
    moved = request()
    moved.state = source
    if (source, target) in LEGAL:
        moved.move(target)
        assert moved.state is target
    else:
        with pytest.raises(StateError):
            moved.move(target)
        assert moved.state is source


def test_seeds_are_given_or_drawn():
    assert request().seed != request().seed
    seeded = Request(id="r", prompt_ids=(1,), params=SamplingParams(seed=-1))
    assert seeded.seed == 2**64 - 1


def test_what_crosses_a_process_is_enough_to_resume():
    first = request(output_ids=[5], deadline=1e12)
    wire = first.wire()
    left = wire.pop("seconds_left")
    again = Request(**wire)
    assert left > 0 and again.seed == first.seed and again.token_ids == [1, 2, 5]


@pytest.mark.parametrize(
    "field",
    [
        {"n": 0},
        {"temperature": -0.1},
        {"temperature": math.nan},
        {"top_p": 0.0},
        {"top_k": -2},
        {"min_p": 1.5},
        {"presence_penalty": 3},
        {"repetition_penalty": 0},
        {"max_tokens": 0},
        {"min_tokens": 20},
        {"logprobs": 21},
        {"stop": ""},
        {"stop_token_ids": (-1,)},
        {"logit_bias": {1: 200}},
        {"allowed_token_ids": ()},
        {"temperature": True},
    ],
)
def test_bad_settings_name_their_field(field):
    with pytest.raises(RequestError) as caught:
        SamplingParams(**field)
    assert caught.value.param


@pytest.mark.parametrize(
    "field",
    [
        {"max_num_seqs": 0},
        {"block_size": 24},
        {"num_blocks": 0},
        {"max_num_batched_tokens": 8, "max_num_seqs": 9},
        {"scheduling_policy": "lifo"},
    ],
)
def test_bad_dials_are_refused(field):
    with pytest.raises(ConfigError, match=next(iter(field))):
        EngineConfig(**field)
