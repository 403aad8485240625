"""The rollout benchmark from command to record: `twofold align` as its runner starts it, on the tiny policy."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_our_side_alone(tmp_path: Path) -> None:
    record = tmp_path / "record.json"
    command = [sys.executable, "-m", "twofold", "bench", "rollout_peers", "--quick", "--threads", "1", "--turns", "2"]
    command += ["--place", str(tmp_path), "--cache", str(tmp_path), "--json", str(record)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    full, ends, ppo = json.loads(record.read_text())["cells"]
    assert [cell["kind"] for cell in (full, ends, ppo)] == ["full", "ends", "ppo"]
    for cell in (full, ends, ppo):
        ours = cell["sides"]["twofold"]
        assert ours["rollout_tokens_s"]["least"] > 0 and ours["step_s"]["least"] > ours["rest_s"]["least"] > 0
        assert "make peers" in cell["not_here"]["TRL"] and not cell["ours_over"]
        assert ours["first"]["kl"] == 0.0 and ours["first"]["equal"] == 1.0 and ours["first"]["grad_norm"] > 0
    assert full["sides"]["twofold"]["tokens"] == ppo["sides"]["twofold"]["tokens"] == [16 * 16] * 2
    assert all(16 <= tokens < 16 * 16 for tokens in ends["sides"]["twofold"]["tokens"])
    assert "GB/s read" in done.stdout and "mean answer" in done.stdout
