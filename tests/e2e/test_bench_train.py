"""The training benchmark from command to record: our own ranks, each a process, on the small decoder."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_our_stages_on_two_ranks(tmp_path: Path) -> None:
    record = tmp_path / "record.json"
    command = [sys.executable, "-m", "twofold", "bench", "train_peers", "--quick", "--threads", "2", "--steps", "2"]
    command += ["--peers", "DDP", "--place", str(tmp_path), "--cache", str(tmp_path), "--json", str(record)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    (cell,) = json.loads(record.read_text())["cells"]
    assert list(cell["engines"]) == [f"twofold {each}" for each in (0, 1, 2, 3, "disk")]
    for found in cell["engines"].values():
        assert found["tokens_per_second"] > 0 and found["peak_mib"] > 50
        assert len(found["losses"]) == 4 and found["losses"]["3"] < found["losses"]["0"] - 0.1
        assert found["apart"] < 1e-4
    assert "make peers" in cell["not_here"]["DDP"] and "the same work" in done.stdout
