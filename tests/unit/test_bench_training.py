"""The training benchmark's sums: who is compared with whom, what a turn came to, and what a decoder needs."""

from __future__ import annotations

from pathlib import Path

import pytest
from train_engines import OUR_ENGINES, PEER_ENGINES, Turn, chosen, environment
from train_figures import Outcome, apart, compare, fastest, leanest, record, told
from train_shapes import SHAPES, Shape, make

from twofold.models import read_spec, spec_from
from twofold.models.decoder import Decoder


def outcome(ours: bool, rates: list[float], peak: float, losses: tuple[float, ...] = (9.0, 8.5)) -> Outcome:
    return Outcome(ours=ours, rates=dict(enumerate(rates)), peak_mib=peak, losses=dict(enumerate(losses)))


def three(peer_peak: float = 1000.0, peer_losses: tuple[float, ...] = (9.0, 8.5)) -> dict[str, Outcome]:
    return {
        "twofold 0": outcome(True, [300.0, 330.0, 400.0], 1200.0),
        "twofold 3": outcome(True, [280.0, 200.0, 210.0], 900.0),
        "DDP": outcome(False, [200.0, 220.0, 100.0], peer_peak, peer_losses),
    }


def test_a_peer_meets_the_fastest_of_ours_that_holds_no_more() -> None:
    lean, roomy, least = (compare("DDP", three(peak)) for peak in (1000.0, 1200.0, 800.0))
    assert (lean.within, roomy.within, least.within) == ("twofold 3", "twofold 0", "")
    assert lean.ratio and lean.ratio.median == pytest.approx(1.4) and lean.reached
    assert roomy.ratio and roomy.ratio.median == pytest.approx(1.5) and roomy.ratio.most == 4.0
    assert least.ratio is None and not least.reached


def test_a_ratio_is_of_turns_that_both_had() -> None:
    outcomes = three(1200.0)
    outcomes["DDP"].rates = {0: 300.0}
    found = compare("DDP", outcomes)
    assert found.ratio and found.ratio.median == 1.0 and not found.reached


def test_the_table_says_whether_the_goal_is_reached() -> None:
    good, bad = told(three()), told(three(1000.0, (9.0, 8.6)))
    assert any("twofold 3, 1.40 (0.91 to 2.10)*" in line for line in good)
    assert any("best peer DDP: ours 1.40 times as fast; goal 1.3 reached" in line for line in good)
    assert any("least memory: twofold 3, 0.90 of the leanest peer's" in line for line in good)
    assert any("the same work" in line for line in good) and any("NOT THE SAME WORK" in line for line in bad)
    assert any("none of ours holds so little" in line for line in told(three(100.0)))


def test_losses_are_compared_by_step() -> None:
    outcomes = three(1000.0, (9.0, 8.6, 4.0))
    assert apart(outcomes)["DDP"] == (pytest.approx(0.1), 2)
    outcomes["DDP"].losses = {7: 1.0}
    assert apart(outcomes)["DDP"] == (float("inf"), 0)


def test_the_fastest_and_the_leanest() -> None:
    outcomes = three()
    assert fastest(outcomes, ours=True) == "twofold 0" and leanest(outcomes, ours=True) == "twofold 3"
    assert fastest({}, ours=False) is None
    written = record(outcomes)
    assert written["DDP"]["within"] == "twofold 3" and "ratio" not in written["twofold 0"]


def test_a_turn_is_as_slow_as_its_slowest_rank() -> None:
    answers = [
        {"seconds": 1.0, "first": 4, "losses": [9.0, 8.0], "peak_mib": 10},
        {"seconds": 2.0, "first": 4, "losses": [7.0, 6.0], "peak_mib": 30},
    ]
    assert Turn.of(answers) == Turn(seconds=2.0, losses={4: 8.0, 5: 7.0}, peak_mib=30)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=lambda shape: shape.name)
def test_a_shape_knows_its_size(shape: Shape) -> None:
    decoder = Decoder(spec_from(shape.config()), device="meta")
    assert sum(p.numel() for p in decoder.parameters()) == shape.parameters
    assert shape.needs(0, 1) > 16 * shape.parameters > 0
    assert shape.needs(3, 4) < shape.needs(2, 4) < shape.needs(0, 4)


def test_a_decoder_is_written_once(tmp_path: Path) -> None:
    shape = Shape(name="tiny", hidden=64, width=64, layers=1, vocab=64, length=16)
    folder = make(shape, tmp_path)
    written = (folder / "model.safetensors").stat().st_mtime_ns
    assert make(shape, tmp_path) == folder and (folder / "model.safetensors").stat().st_mtime_ns == written
    assert read_spec(folder).vocab == 64


def test_ranks_are_told_as_torchrun_tells_them() -> None:
    ours, peer = (environment(engine, 2, 1, 4, 1234) for engine in (OUR_ENGINES[0], PEER_ENGINES[0]))
    for env in (ours, peer):
        assert (env["RANK"], env["WORLD_SIZE"], env["MASTER_PORT"], env["OMP_NUM_THREADS"]) == ("1", "4", "1234", "2")
    assert "PYTHONPATH" in ours and "PYTHONPATH" not in peer


def test_alone_our_stages_are_one() -> None:
    assert [engine.name for engine in chosen(1, ["DDP"])] == ["twofold 0", "twofold disk", "DDP"]
    assert len(chosen(2, [])) == 5
