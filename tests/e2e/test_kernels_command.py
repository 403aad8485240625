"""`twofold kernels`, and `--kernels` of the commands that run a model."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from twofold import cli
from twofold.commands import doctor
from twofold.commands import kernels as command
from twofold.kernels import all_ops, native, samples
from twofold.kernels.op import VARIABLE, Call, Op, use_named

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _usual(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(VARIABLE, "")
    yield
    use_named("")


def said(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert cli.main(list(argv)) == 0
    return capsys.readouterr().out


def test_every_op_can_be_measured(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "_ENOUGH", 0.0)
    rows = {line.split()[0]: line for line in said(capsys, "kernels").splitlines() if line and line[0] != " "}
    for op in all_ops():
        chosen, _ = op.decide()
        assert re.match(rf"{op.name} +{chosen.name} +[\d.]+ (ms|us)  ", rows[op.name])
        assert (" x " in rows[op.name]) == (chosen.name != "reference")
        assert ("bits of its own" in rows[op.name]) == (chosen.bits == "own")


@pytest.mark.parametrize("op", list(all_ops()), ids=lambda op: op.name)
def test_who_claims_the_references_bits_has_them(op: Op[..., object]) -> None:
    assert samples and op.sampler is not None, "give it a sample, in kernels/samples.py"
    args = op.sampler()
    with torch.no_grad():
        truth = op.reference(*args)
        for item in op.implementations.values():
            if item.bits == "reference" and not item.refusal(Call(dtype=torch.float32)):
                found = item.run(*args)
                assert alike(found, truth), item.name


def alike(a: object, b: object) -> bool:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(alike, a, b))
    return type(a) is type(b) and a == b


def test_a_forced_reference_and_what_else_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    use_named("linear=rows")
    lines = said(capsys, "kernels", "--no-measure").splitlines()
    at = next(number for number, line in enumerate(lines) if line.startswith("linear "))
    assert re.match(r"linear +rows +chosen by name$", lines[at])
    if native.library():
        assert re.match(r" +native +another is chosen by name$", lines[at + 1])


def test_the_library_is_told_of_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    found = native.library()
    assert found is None or command.library().startswith(f"CPU kernels: for {found.isa}, built ")
    monkeypatch.setattr(native, "state", lambda: (None, "no C++ compiler was found"))
    assert command.library() == f"CPU kernels: none, no C++ compiler was found; {native.COST}"
    machine = doctor.current()
    facts = dict(doctor.facts(machine, None, {}))
    assert facts["cpu kernels"] == "none: no C++ compiler was found"
    versions = dict.fromkeys((*doctor.NEEDED, *doctor.USEFUL))
    assert ("CPU kernels", native.COST) in list(doctor.missing(machine, None, versions))


# ------------------------------------------------------------------------------------------------ --kernels
def test_generate_serves_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    said(capsys, "generate", "--prompt", "def f", "--max-tokens", "2", "--kernels", "linear=rows")
    assert os.environ[VARIABLE] == "linear=rows"
    assert {op.name: op.serving()[::2] for op in all_ops()}["linear"] == ("rows", "chosen by name")


@pytest.mark.parametrize("command", [["generate", "--prompt", "x"], ["train", "recipes/pybot/pretrain.toml"]])
def test_a_wrong_name_is_told_with_the_nearest(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*command, "--kernels", "linar=rows"]) == 2
    assert "unknown op 'linar': did you mean 'linear'" in capsys.readouterr().err
    assert cli.main([*command, "--kernels", "linear=row"]) == 2
    assert "unknown implementation of linear 'row': did you mean 'rows'" in capsys.readouterr().err
    assert os.environ[VARIABLE] == ""


def test_the_server_leaves_when_there_is_no_such_name() -> None:
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    argv = [sys.executable, "-m", "twofold", "serve", "--port", "0", "--kernels", "linear=row"]
    done = subprocess.run(argv, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "unknown implementation of linear 'row': did you mean 'rows'" in done.stderr
