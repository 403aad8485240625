"""Rows with a grammar, without the grammar: forced tokens, rows that wait for masks, texts that are complete."""

from __future__ import annotations

import msgspec

from tests.unit.fake_runner import Bench, ask, expected
from twofold.engine.gate import Gate
from twofold.engine.plan import StepResult
from twofold.engine.request import State
from twofold.engine.row import Row
from twofold.engine.structured import StructuredOutputs

FORM = StructuredOutputs(regex="a")


def gate_of(bench: Bench) -> tuple[Row, Gate]:
    (row,) = bench.scheduler.gated.values()
    assert row.gate is not None
    return row, row.gate


def say(gate: Gate, at: int, forced: tuple[int, ...] = (), mask: bytes = b"\x01") -> None:
    gate.at, gate.forced, gate.mask, gate.held = at, forced, mask, False


def nothing_drawn(bench: Bench) -> None:
    """A step in which no row with a grammar had a mask in time."""
    plan = bench.scheduler.plan()
    rows = [
        msgspec.structs.replace(row, tokens=()) if row.serial in bench.scheduler.gated else row
        for row in bench.runner.execute(plan).rows
    ]
    for row in bench.scheduler.gated.values():
        assert row.gate is not None
        row.gate.held = True
    bench.scheduler.apply(StepResult(step=plan.step, rows=tuple(rows)))
    bench.collect()


def test_a_row_that_waits_for_its_mask_holds_up_nobody() -> None:
    bench = Bench()
    bench.submit(ask("r", range(6), 4, structured_outputs=FORM))
    bench.submit(ask("other", [9] * 5, 4))
    nothing_drawn(bench)
    row, gate = gate_of(bench)
    plan = bench.step()
    assert [chunk.serial for chunk in plan.chunks] != [row.serial] and row.held
    bench.step(), bench.step()
    assert bench.finish("other") is State.LENGTH and not row.request.output_ids
    assert bench.scheduler.plan().chunks == () and bench.scheduler.has_work
    say(gate, 0)
    assert bench.step().chunks[0].start == 5, "the last token is computed again"
    for said in range(1, 4):
        say(gate, said)
        bench.step()
    assert bench.tokens("r") == expected(tuple(range(6)), 4) and bench.scheduler.gated == {}


def test_forced_tokens_ride_as_drafts() -> None:
    bench = Bench()
    bench.submit(ask("r", range(6), 9, structured_outputs=FORM))
    text = tuple(expected(tuple(range(6)), 9))
    _, gate = gate_of(bench)
    say(gate, 0, text[:4])
    assert bench.step().chunks[0].drafts == text[:4]
    assert bench.tokens("r") == list(text[:5])
    say(gate, 5, text[5:8], b"")
    assert bench.step().chunks[0].drafts == text[5:7], "the last token of all is only drawn"
    assert bench.tokens("r") == list(text[:8])
    say(gate, 8, (), b"")
    assert bench.scheduler.plan().chunks == ()
    bench.collect()
    assert bench.finish("r") is State.STOP and bench.tokens("r") == list(text[:8])


def test_what_was_said_of_another_place_counts_for_nothing() -> None:
    bench = Bench()
    bench.submit(ask("r", range(6), 3, structured_outputs=FORM))
    _, gate = gate_of(bench)
    say(gate, 2, (1, 2), b"")
    assert bench.step().chunks[0].drafts == ()
    bench.scheduler.preempt_all()
    assert gate.at == 2, "a preemption changes no token, so what is known stays known"


def test_faults_end_the_row_wherever_it_stands() -> None:
    for steps in (0, 1):
        bench = Bench(max_num_seqs=1)
        bench.submit(ask("first", range(3), 5))
        bench.submit(ask("r", range(6), 5, structured_outputs=FORM))
        for _ in range(steps):
            bench.step()
        _, gate = gate_of(bench)
        gate.error = "too costly"
        bench.drain()
        last = bench.outputs["r"][-1]
        assert (last.finish, last.error, last.param) == (State.ERROR, "too costly", "structured_outputs")
        assert bench.finish("first") is State.LENGTH


def test_a_text_complete_before_min_tokens_is_an_error() -> None:
    gate = Gate()
    assert gate.end(0, 0) is None
    say(gate, 3, (), b"")
    assert gate.end(3, 0) == (State.STOP, None) and gate.end(2, 0) is None
    state, why = gate.end(3, 5) or (None, None)
    assert state is State.ERROR and "min_tokens is 5" in str(why)
