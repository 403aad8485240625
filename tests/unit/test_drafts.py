"""Several tokens of a request in one step, under a fake runner: the text stays, whatever was guessed."""

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.fake_runner import VOCAB, Bench, ask, expected, next_token
from twofold.engine.plan import ChunkResult, StepPlan, StepResult
from twofold.engine.request import State, TokenOut


class Oracle:
    """Guesses `length` tokens of every row, rightly up to `right`; what it was told is kept."""

    def __init__(self, length=3, right=2):
        self.length, self.right = length, right
        self.said, self.gone = [], []

    def guess(self, rows, base, room):
        out = {}
        for row in (row for row in rows if row.guessable > 0):
            history = [*row.request.prompt_ids, *row.request.output_ids]
            drafts = []
            for place in range(self.length):
                token = next_token(history) if place < self.right else (next_token(history) + 1) % VOCAB
                drafts.append(token)
                history.append(token)
            out[row.serial] = tuple(drafts)
        return out

    def told(self, row, drawn, drafted):
        assert len(drawn) - 1 == min(drafted, self.right)
        if drafted:
            self.said.append((drafted, len(drawn) - 1))

    def forget(self, row):
        self.gone.append(row.request.id)


def test_a_step_decides_as_many_tokens_as_were_guessed_rightly_and_one_more():
    oracle = Oracle(3, 2)
    bench = Bench(speculation=oracle)
    bench.submit(ask("r", range(6), 14))
    bench.drain()
    assert bench.tokens("r") == expected(tuple(range(6)), 14)
    assert [len(output.tokens) for output in bench.outputs["r"]] == [3, 3, 3, 3, 2]
    assert oracle.said == [(3, 2)] * 4 + [(1, 1)], "no draft beyond what may still come"
    assert oracle.gone == ["r"]


def test_what_ends_a_request_ends_it_amid_the_accepted():
    prompt = (1, 2, 3)
    text = expected(prompt, 8)
    eos, stop = text[1], text[3]
    cases = [
        ({}, State.STOP, None, 2),
        ({"ignore_eos": True}, State.LENGTH, None, 8),
        ({"ignore_eos": True, "stop_token_ids": (stop,)}, State.STOP, stop, 4),
        ({"min_tokens": 3, "stop_token_ids": (stop,)}, State.STOP, stop, 4),
        ({"max_tokens": 2}, State.STOP, None, 2),
        ({"max_tokens": 1}, State.LENGTH, None, 1),
        ({"max_tokens": 6, "ignore_eos": True}, State.LENGTH, None, 6),
    ]
    for params, state, reason, count in cases:
        bench = Bench(eos_ids=(eos,), speculation=Oracle(6, 6))
        bench.submit(ask("r", prompt, **({"max_tokens": 8} | params)))
        bench.drain()
        last = bench.outputs["r"][-1]
        assert (bench.finish("r"), last.stop_reason, bench.tokens("r")) == (state, reason, text[:count]), params
        assert bench.scheduler.generation_tokens == count


def test_each_draw_has_its_own_position_bans_and_history():
    bench = Bench(eos_ids=(5,), speculation=Oracle(3, 3))
    bench.submit(ask("r", [1, 2], 9, min_tokens=2, repetition_penalty=1.5))
    chunk = bench.step().chunks[0]
    text = tuple(expected((1, 2), 3))
    assert chunk.drafts == text and chunk.ids == (1, 2, *text)
    assert [draw.position for draw in chunk.draws] == [2, 3, 4, 5]
    assert [draw.banned for draw in chunk.draws] == [(5,), (5,), (), ()]
    assert [draw.output_ids for draw in chunk.draws] == [text[:count] for count in range(4)]
    assert all(draw.prompt_ids == (1, 2) for draw in chunk.draws)
    plan = StepPlan(step=1, chunks=(chunk,))
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(plan), type=StepPlan) == plan


def test_drafts_take_no_block_that_a_token_may_need():
    bench = Bench(num_blocks=4, block_size=4, max_model_len=100, speculation=Oracle(8, 8))
    bench.submit(ask("a", [1] * 5, 3))
    bench.submit(ask("b", [2] * 5, 3))
    bench.drain()
    assert bench.scheduler.preemptions == 0
    assert bench.tokens("a") == expected((1,) * 5, 3) and bench.tokens("b") == expected((2,) * 5, 3)


def test_only_blocks_of_accepted_tokens_can_be_found():
    bench = Bench(speculation=Oracle(9, 1))
    bench.submit(ask("r", range(5), 13))
    while bench.scheduler.has_work:
        bench.step()
        for row in bench.scheduler.running:
            names = [name for name in bench.pool._named if name]
            known = [*row.request.prompt_ids, *row.request.output_ids]
            assert len(names) == row.request.num_computed // 4
            assert row.request.num_computed == len(known) - 1
    again = bench.submit(ask("again", [*range(5), *expected(tuple(range(5)), 13)], 2))
    bench.drain()
    assert again.num_cached == 16


def test_a_step_may_decide_nothing_and_the_last_token_is_computed_again():
    bench = Bench()
    bench.submit(ask("r", range(6), 4))
    bench.step()
    plan = bench.scheduler.plan()
    result = bench.runner.execute(plan)
    late = [msgspec.structs.replace(row, tokens=()) for row in result.rows]
    bench.scheduler.apply(StepResult(step=plan.step, rows=tuple(late)))
    assert bench.step().chunks[0].start == plan.chunks[0].start
    bench.drain()
    assert bench.tokens("r") == expected(tuple(range(6)), 4)


def test_after_drafts_that_ruined_their_blocks_a_row_is_computed_again_and_guesses_no_more():
    oracle = Oracle(3, 1)
    bench = Bench(speculation=oracle)
    bench.submit(ask("r", range(6), 9))
    bench.step()
    plan = bench.scheduler.plan()
    chunk = plan.chunks[0]
    assert chunk.drafts
    bench.runner.slots[bench.runner.slot(chunk.blocks, 4)] = None
    row = ChunkResult(serial=chunk.serial, redo=chunk.start // 4 * 4)
    bench.scheduler.apply(StepResult(step=plan.step, rows=(row,)))
    told = len(oracle.said)
    bench.drain()
    assert bench.tokens("r") == expected(tuple(range(6)), 9) and len(oracle.said) == told


@pytest.mark.parametrize("caching", [True, False])
@settings(max_examples=60)
@given(data=st.data())
def test_any_guesses_leave_every_text_as_it_is(caching, data):
    """Random guessers, tight pools, chunked prompts, shared prefixes, aborts and preemptions."""
    length, right = data.draw(st.integers(0, 9)), data.draw(st.integers(0, 9))
    size = data.draw(st.sampled_from([2, 4, 8]))
    bench = Bench(
        num_blocks=data.draw(st.integers(64 // size, 200 // size)),
        block_size=size,
        budget=data.draw(st.integers(4, 24)),
        max_num_seqs=4,
        caching=caching,
        speculation=Oracle(length, right),
    )
    prompts = {}
    for number in range(data.draw(st.integers(1, 6))):
        shared = data.draw(st.integers(0, 12))
        prompts[f"r{number}"] = tuple(range(shared)) + (number + 1,) * data.draw(st.integers(1, 9))
        bench.submit(ask(f"r{number}", prompts[f"r{number}"], data.draw(st.integers(1, 30))))
    aborted = data.draw(st.sampled_from([None, *prompts]))
    for _ in range(data.draw(st.integers(0, 6))):
        if bench.scheduler.has_work:
            bench.step()
            bench.scheduler.check_integrity()
    if aborted:
        bench.scheduler.abort(aborted)
        bench.collect()
    if data.draw(st.booleans()):
        bench.scheduler.preempt_all()
    bench.drain()
    for name, prompt in prompts.items():
        text = bench.tokens(name)
        assert text == expected(prompt, len(text))
        assert bench.finish(name) in ((State.ABORT, State.LENGTH) if name == aborted else (State.LENGTH,))


def test_tokens_of_a_result_cross_a_process():
    result = StepResult(step=3, rows=(ChunkResult(serial=1, tokens=(TokenOut(4, -0.5, 1), TokenOut(5))),))
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(result), type=StepResult) == result
