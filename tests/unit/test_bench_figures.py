"""Seconds become figures, figures become ratios, and a ratio is held against the goal."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from typing import Any

import pytest
from chart import chart
from figures import CELLS, Against, Results, agreement, best_of, shares, table, told
from workload import Sizes, workload

FULL = Sizes(cores=4, vocab=1000)


def test_decoding_leaves_the_first_token_out() -> None:
    assert CELLS["A"].figure(2.6, 0.06, workload("A", 0, FULL)) == pytest.approx(127 / 2.54)
    assert CELLS["B"].figure(0.5, 0.1, workload("B", 0, FULL)) == 2048
    assert CELLS["C"].figure(4.0, 0.1, workload("C", 0, FULL)) == 512
    assert CELLS["E"].figure(4.0, 0.1, workload("E", 0, FULL)) == 4.0


def test_a_ratio_above_one_is_always_in_our_favour() -> None:
    assert CELLS["C"].ratio(300, 200) == 1.5
    assert CELLS["E"].ratio(2.0, 4.0) == 2.0


def test_static_batching_has_a_goal_of_its_own() -> None:
    assert CELLS["D"].goal_over("transformers") == 5 and CELLS["D"].goal_over("vLLM") == 1.5
    assert CELLS["A"].goal_over("transformers") == 1.2


def test_agreement_counts_until_the_first_difference() -> None:
    assert agreement([[1, 2, 3, 4]], [[1, 2, 9, 4]]) == 0.5
    assert agreement([[1], [2, 3]], [[1], [2, 3]]) == 1.0


def test_shares_of_the_limits() -> None:
    limits = {"read_gb_s": 40.0, "fma_gflop_s": 400.0, "int8_gop_s": 800.0}
    results = Results(ours={"A": [20.0], "B": [100.0]})
    bf16 = shares(results, "bf16", 440_000_000, 156_000_000, 1024, limits)
    assert bf16["A of read bandwidth"] == pytest.approx(20 * 2 * 0.596 / 40)
    assert bf16["B of the fp32 peak"] == pytest.approx(100 * 2 * (440e6 + 156e6 / 1024) / 1e9 / 400)
    int4 = shares(results, "int4", 440_000_000, 156_000_000, 1024, limits)
    assert int4["A of read bandwidth"] == pytest.approx(20 * (0.440 * 4.5 / 8 + 0.156) / 40)
    assert int4["B of the int8 peak"] == pytest.approx(bf16["B of the fp32 peak"] / 2)


def test_the_most_of_each_limit_counts() -> None:
    seen = [{"read_gb_s": 10.0, "int8_by": "x"}, {"read_gb_s": 12.0, "int8_by": "x"}]
    assert best_of(seen) == {"read_gb_s": 12.0, "int8_by": "x"}


def record(ratio: float) -> dict[str, Any]:
    results = Results(
        ours={"A": [30.0, 40.0, 50.0]},
        peers={"A": {"llama.cpp": Against(figures=[20.0, 20.0, 20.0], ratios=[ratio - 0.1, ratio, ratio + 0.1])}},
        absent={"vLLM": "no environment <here>"},
    )
    assert any("reached" in line for line in told("A", results)) == (ratio >= 1.2)
    return results.record({})


def test_the_table_stars_what_reaches_the_goal() -> None:
    good, bad = (table({"int8": record(ratio)}) for ratio in (1.3, 1.1))
    assert any("1.30*" in line for line in good)
    assert any("1.10 " in line for line in bad) and not any("*" in line for line in bad)
    assert any("not measured: no environment" in line for line in good)


@pytest.mark.parametrize(("ratio", "kind", "length"), [(2.4, "met", 90.0), (1.2, "met", 45.0), (0.6, "missed", 22.5)])
def test_the_chart_draws_the_goal_half_the_way(ratio: float, kind: str, length: float) -> None:
    limits = {"read_gb_s": 40.0, "fma_gflop_s": 400.0, "int8_gop_s": 800.0}
    drawn = chart({"model": "a<b", "threads": 4, "scaled": "", "limits": limits, "formats": {"int8": record(ratio)}})
    root = ElementTree.fromstring(drawn)
    bars = [node for node in root.iter() if node.get("class") in ("met", "missed")]
    assert [(bar.get("class"), float(bar.get("width", "0"))) for bar in bars] == [(kind, length)]
    assert "prefers-color-scheme: dark" in drawn and f"{ratio:.2f}" in drawn
