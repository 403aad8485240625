"""The benchmark of recomputation: what it counts is what the forecast says, and the policies keep their promises."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_a_quick_run_counts_what_each_policy_saves_and_costs(tmp_path: Path) -> None:
    record = tmp_path / "record.json"
    command = [sys.executable, str(ROOT / "benchmarks" / "recompute.py"), "--quick", "--json", str(record)]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "gradients of all policies: the same bits" in done.stdout
    rows = json.loads(record.read_text())
    kept = {row["policy"]: row for row in rows if row["kept_on"] == "device"}
    filed = {row["policy"]: row for row in rows if row["kept_on"] == "disk"}
    assert {policy: row["held_bytes"] for policy, row in kept.items()} == {
        policy: row["forecast_bytes"] for policy, row in kept.items()
    }
    held, extra = ({policy: row[key] for policy, row in kept.items()} for key in ("held_bytes", "flops_again"))
    assert held["full"] < held["every-2"] < held["selective"] < held["none"] and held["ffn"] < held["none"]
    assert extra["none"] == extra["selective"] == 0 < extra["every-2"] < extra["full"]
    assert extra["attention"] + extra["ffn"] < extra["full"] < kept["none"]["flops"] / 3
    for policy, row in filed.items():
        assert row["held_bytes"] < held[policy] / 10 and row["file_bytes"] >= held[policy]
        assert row["peak_bytes"] <= kept[policy]["peak_bytes"]
