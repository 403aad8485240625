"""`twofold train --profile`: a run like any other that says after some steps where they went."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_recipe import write_recipe

from twofold import cli
from twofold.train.journal import read_rows


def test_a_profiled_run_trains_as_any_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changes = ["--set", "schedule.steps=8", "--set", "sample.prompts=[]"]
    plain = write_recipe(tmp_path / "plain")
    assert cli.main(["train", str(plain), *changes]) == 0
    capsys.readouterr()
    policy = ['recompute = "selective"', 'recompute_layers = { "1" = "full" }', 'activations = "disk"']
    recipe = write_recipe(tmp_path / "other", model="\n".join(policy))
    assert cli.main(["train", str(recipe), *changes, "--profile", "--profile-comm"]) == 0
    said = capsys.readouterr().out
    assert "packed_attention" in said and "layers 0-1 (2)" in said and "none: this run is one process" in said
    assert "% of peak" in said and " GB" in said
    tree = json.loads((tmp_path / "other" / "run" / "profile.json").read_text())["tree"]
    assert tree["flops"]["again"] > 0 and tree["activation_bytes"] > 0
    rows = [
        [(row["loss"], row["grad_norm"]) for row in read_rows(tmp_path / name / "run" / "log.jsonl") if "loss" in row]
        for name in ("plain", "other")
    ]
    assert len(rows[0]) == 8 and rows[0] == rows[1]
    assert all(row["peak_share"] > 0 for row in read_rows(tmp_path / "other" / "run" / "log.jsonl") if "loss" in row)
