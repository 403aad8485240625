"""The load benchmarks from command to record: any server by its address, and our own, with SplitFuse and without."""

from __future__ import annotations

import json
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

from served import Served

ROOT = Path(__file__).resolve().parents[2]


def bench(name: str, *flags: str) -> str:
    command = [sys.executable, "-m", "twofold", "bench", name, *flags]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_server_by_its_address(server: Served, tmp_path: Path) -> None:
    record, drawing = tmp_path / "record.json", tmp_path / "chart.svg"
    flags = [
        "--base-url",
        server.url,
        "--num-prompts",
        "6",
        "--request-rate",
        "40",
        "--input-len",
        "24",
        "--vocab-size",
        "200",
    ]
    said = bench(
        "serve", *flags, "--output-len", "9", "--goodput", "e2el:60000", "--json", str(record), "--svg", str(drawing)
    )
    found = json.loads(record.read_text())["run"]
    assert found["completed"] == 6 and found["failed"] == 0 and found["tokens_out"] == 6 * 9
    assert found["goodput_s"] == found["requests_s"] > 0 and "goodput" in said
    assert 0 < found["ttft_ms"]["p50"] <= found["e2el_ms"]["p50"]
    ET.parse(drawing)
    bench(
        "serve",
        *flags,
        "--endpoint",
        "chat",
        "--sla",
        "--clients",
        "1",
        "2",
        "--output-len",
        "5",
        "--json",
        str(record),
    )
    curve = json.loads(record.read_text())["curve"]
    assert [point["clients"] for point in curve] == [1, 2] and all(point["failed"] == 0 for point in curve)


def test_splitfuse_on_and_off(tiny: Path, tmp_path: Path) -> None:
    record = tmp_path / "record.json"
    said = bench(
        *(
            "splitfuse",
            "--model",
            str(tiny),
            "--turns",
            "1",
            "--num-prompts",
            "4",
            "--budget",
            "160",
            "--vocab-size",
            "200",
        ),
        *("--request-rate", "50", "--json", str(record)),
    )
    found = json.loads(record.read_text())
    assert {side: [run["completed"] for run in runs] for side, runs in found["runs"].items()} == {"on": [4], "off": [4]}
    assert "off over on" in said
