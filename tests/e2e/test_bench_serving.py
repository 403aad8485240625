"""The serving benchmark from command to record: our own engine in a process of its own, on the small model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def bench(name: str, *flags: str) -> str:
    command = [sys.executable, "-m", "twofold", "bench", name, "--quick", "--threads", "1", *flags]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_serving_alone(tmp_path: Path) -> None:
    record, drawing = tmp_path / "record.json", tmp_path / "chart.svg"
    flags = ["--peers", "vLLM", "--place", str(tmp_path), "--models", str(tmp_path / "models"), "--only", "ABE"]
    said = bench("serving", *flags, "--formats", "fp32", "int8", "--json", str(record), "--svg", str(drawing))
    found = json.loads(record.read_text())
    assert list(found["formats"]) == ["fp32", "int8"]
    for form in found["formats"].values():
        assert list(form["cells"]) == ["A", "B", "E", "E'"]
        assert all(cell["ours"] > 0 for cell in form["cells"].values())
        assert 0 < form["shares"]["A of read bandwidth"] < 2
        assert "make peers" in form["not_here"]["vLLM"]
    assert "vLLM: not here: no environment" in said and "GB/s read" in said
    assert drawing.read_text().startswith("<svg")


def test_sparse_attention_by_length_and_layout(tmp_path: Path) -> None:
    record = tmp_path / "record.json"
    bench("sparse", "--lengths", "1500", "--json", str(record))
    found = {(each["work"], each["layout"]): each for each in json.loads(record.read_text())["sparse"]}
    assert len(found) == 3 * 8
    assert found["forward", "dense"]["share_of_dense"] == found["forward", "dense"]["share_of_pairs"] == 1
    assert all(0 < each["share_of_pairs"] < 1 for key, each in found.items() if key[1] != "dense")


def test_kernels_of_some_ops(tmp_path: Path) -> None:
    record = tmp_path / "record.json"
    bench("kernels", "--ops", "rms_norm", "rotate", "--json", str(record))
    found = json.loads(record.read_text())["ops"]
    assert {each["op"] for each in found} == {"rms_norm", "rotate"}
    assert all(each["microseconds"] > 0 and each["share_of_limit"] > 0 for each in found)
