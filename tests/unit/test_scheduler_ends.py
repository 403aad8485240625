"""How requests come in and end: limits at the door, stops in their order, deadlines, aborts, errors, resumption."""

import pytest

from tests.unit.fake_runner import VOCAB, Bench, ask, expected
from twofold.core import CapacityError, RequestError
from twofold.engine.plan import ChunkResult, StepResult
from twofold.engine.request import State, TokenOut


def test_ends_come_in_order():
    prompt = (1, 2, 3)
    text = expected(prompt, 6)
    eos, stop = text[1], text[3]
    cases = [
        ({}, State.STOP, None, 2),
        ({"ignore_eos": True}, State.LENGTH, None, 6),
        ({"ignore_eos": True, "stop_token_ids": (stop,)}, State.STOP, stop, 4),
        ({"stop_token_ids": (eos,)}, State.STOP, None, 2),
        ({"min_tokens": 3, "stop_token_ids": (stop,)}, State.STOP, stop, 4),
        ({"max_tokens": 2}, State.STOP, None, 2),
        ({"max_tokens": 1}, State.LENGTH, None, 1),
    ]
    for params, state, reason, count in cases:
        bench = Bench(eos_ids=(eos,))
        bench.submit(ask("r", prompt, **({"max_tokens": 6} | params)))
        bench.drain()
        last = bench.outputs["r"][-1]
        assert (bench.finish("r"), last.stop_reason, len(bench.tokens("r"))) == (state, reason, count), params


def test_min_tokens_bans_the_ends_until_it_is_reached():
    bench = Bench(eos_ids=(5,))
    bench.submit(ask("r", [1, 2], 4, min_tokens=2, stop_token_ids=(6, 7)))
    bans = [bench.step().chunks[0].draws[0].banned for _ in range(4)]
    assert bans == [(5, 6, 7), (5, 6, 7), (), ()]


def test_the_context_is_the_limit_when_none_is_given():
    bench = Bench(max_model_len=20)
    bench.submit(ask("r", range(8), None))
    bench.drain()
    assert len(bench.tokens("r")) == 12 and bench.finish("r") is State.LENGTH


def test_deadlines_end_waiting_and_running_requests():
    now = [0.0]
    bench = Bench(max_num_seqs=1, clock=lambda: now[0])
    bench.submit(ask("running", [1], 100, deadline=10.0))
    bench.submit(ask("waiting", [2], 100, deadline=5.0))
    bench.step()
    now[0] = 6.0
    bench.step()
    assert bench.finish("waiting") is State.TIMEOUT
    now[0] = 11.0
    bench.scheduler.expire()
    bench.collect()
    assert bench.finish("running") is State.TIMEOUT
    assert not bench.scheduler.has_work and bench.pool.used == 0


def test_abort_at_any_moment_is_idempotent():
    bench = Bench()
    bench.scheduler.abort("nobody")
    bench.submit(ask("r", range(9), 50))
    plan = bench.scheduler.plan()
    result = bench.runner.execute(plan)
    bench.scheduler.abort("r")
    bench.scheduler.abort("r")
    bench.submit(ask("r", range(3), 2))  # the id is free again, the old result must not reach the new request
    bench.scheduler.apply(result)
    bench.collect()
    assert [output.finish for output in bench.outputs["r"]] == [State.ABORT]
    bench.outputs.clear()
    bench.drain()
    assert bench.tokens("r") == expected((0, 1, 2), 2)


def test_a_failed_row_ends_alone():
    bench = Bench()
    bench.submit(ask("bad", [1] * 5, 4))
    bench.submit(ask("good", [2] * 5, 4))
    plan = bench.scheduler.plan()
    result = bench.runner.execute(plan)
    rows = (ChunkResult(serial=result.rows[0].serial, error="not finite"), *result.rows[1:])
    bench.scheduler.apply(StepResult(step=plan.step, rows=rows))
    bench.drain()
    assert bench.finish("bad") is State.ERROR and bench.outputs["bad"][-1].error == "not finite"
    assert bench.tokens("good") == expected((2,) * 5, 4)


def test_a_resumed_request_goes_on_or_ends_at_once():
    text = expected((3, 4, 5), 8)
    bench = Bench(eos_ids=(text[5],))
    resumed = bench.submit(ask("on", (3, 4, 5), 8, output=text[:3]))
    bench.submit(ask("over", (3, 4, 5), 8, output=text[:6]))
    bench.submit(ask("full", (3, 4, 5), 4, output=text[:4]))
    bench.drain()
    assert bench.tokens("on") == text[3:6] and resumed.output_ids == text[:6]
    assert bench.tokens("over") == [] and bench.finish("over") is State.STOP
    assert bench.tokens("full") == [] and bench.finish("full") is State.LENGTH


def test_prompt_scores_come_once_and_do_not_read_the_cache():
    bench = Bench(budget=8, num_blocks=30)
    prompt = tuple(range(21))
    bench.submit(ask("warm", prompt, 1))
    bench.drain()
    scored = bench.submit(ask("scored", prompt, 4, prompt_logprobs=2))
    bench.drain()
    prompts = [output.prompt for output in bench.outputs["scored"] if output.prompt is not None]
    assert len(prompts) == 1 and prompts[0][0] == TokenOut(0) and [t.id for t in prompts[0]] == list(prompt)
    assert scored.num_cached == 0


@pytest.mark.parametrize(
    ("request_", "error", "says"),
    [
        ({"prompt": ()}, RequestError, "no tokens"),
        ({"prompt": [1] * 200}, RequestError, "at most 199"),
        ({"prompt": [VOCAB]}, RequestError, "0 to 96"),
        ({"prompt": [1], "stop_token_ids": (VOCAB,)}, RequestError, "stop_token_ids"),
        ({"prompt": [1], "allowed_token_ids": (1, 400)}, RequestError, "allowed_token_ids"),
        ({"prompt": [1], "logit_bias": {400: 1.0}}, RequestError, "logit_bias"),
        ({"prompt": [1] * 30, "max_tokens": 100}, CapacityError, "lower max_tokens to 35"),
        ({"prompt": [1] * 65}, CapacityError, "at most 64 tokens"),
    ],
)
def test_what_cannot_be_is_refused_with_what_can(request_, error, says):
    bench = Bench(num_blocks=16, block_size=4)
    with pytest.raises(error, match=says):
        bench.submit(ask("r", **request_))
    assert not bench.scheduler.has_work


def test_an_id_is_taken_once():
    bench = Bench()
    bench.submit(ask("r", [1]))
    with pytest.raises(RequestError, match="already"):
        bench.submit(ask("r", [2]))


def test_a_request_that_just_fits_gets_done():
    bench = Bench(num_blocks=4, block_size=4, max_model_len=100)
    bench.submit(ask("r", [1] * 8, 9))
    bench.drain()
    assert len(bench.tokens("r")) == 9
