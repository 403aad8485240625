"""The benchmark of overlap: both sides roll out, train and send, and a transfer carries the whole model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_a_quick_run_measures_both_sides_and_both_ways(tmp_path: Path) -> None:
    record = tmp_path / "record.json"
    flags = ["--quick", "--threads", "2", "--turns", "1", "--steps", "1", "--json", str(record)]
    command = [sys.executable, "-m", "twofold", "bench", "overlap", *flags]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "one step ahead:" in done.stdout
    found = json.loads(record.read_text())
    rates = found["steps"]["tokens_per_second"]
    assert found["steps"]["gain"] == [rates["one ahead"][0] / rates["in turn"][0]]
    for seconds in found["steps"]["seconds_a_step"].values():
        assert all(value > 0 for value in seconds.values())
    assert {row["transport"] for row in found["sending"]} == {"shared", "gloo"}
    for row in found["sending"]:
        layers = 2 * ((128 + 2 * 64) * 128 + 128 * 128 + 3 * 352 * 128)
        assert 0 <= row["nbytes"] - 4 * (layers + 2048 * 128 + 5 * 128) < 64 * 20  # tensors begin at lines
        assert 0 < row["pause"] < 5 and row["seconds"] > 0
