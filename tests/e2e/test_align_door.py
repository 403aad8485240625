"""`twofold align` as people mistype, misconfigure, interrupt and break it: one line says what to do."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
from align_recipe import outcome, run_here, write_recipes

from twofold.align.play import Play
from twofold.cli import main
from twofold.train.trainer import Trainer

OVERLAP = ("--overlap", "--correction.level", "token")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    made = write_recipes(tmp_path_factory.mktemp("door"))
    (made / "one.jsonl").write_text(json.dumps({"prompt": "hi there"}) + "\n")
    (made / "empty.jsonl").write_text("")
    (made / "numbers.jsonl").write_text('{"prompt": 3}\n')
    (made / "adapter").mkdir()
    (made / "adapter" / "adapter_config.json").write_text('{"base_model_name_or_path": "the/base"}')
    shutil.copytree(made / "base", made / "mute")
    settings = json.loads((made / "mute" / "tokenizer_config.json").read_text())
    del settings["chat_template"]
    (made / "mute" / "tokenizer_config.json").write_text(json.dumps(settings))
    for name, (base, more) in EDITED.items():
        (made / f"{name}.toml").write_text((made / f"{base}.toml").read_text() + more.format(folder=made))
    text = (made / "grpo.toml").read_text()
    (made / "unjudged.toml").write_text(text.split("[[rewards]]")[0])
    assert run_here(made / "reward.toml", run__output=str(made / "rm"), schedule__steps=1) == 0
    return made


EDITED = {
    "other-table": ("dpo", "\n[grpo]\ngroup = 3\n"),
    "causal-judge": ("grpo", '\n[[rewards]]\nkind = "model"\nmodel = "{folder}/base"\n'),
    "no-file": ("grpo", '\n[[rewards]]\nkind = "function"\npath = "{folder}/nope.py:f"\n'),
}
MISTAKES = {
    "grpo --algorithm gpro": "did you mean 'grpo'",
    "grpo --max-token 3": "did you mean --rollout.max_tokens?",
    "grpo --grpo.grop 3": "did you mean --grpo.group?",
    "other-table": '[grpo] means nothing to algorithm = "dpo"',
    "unjudged": "needs a [[rewards]] table",
    "nowhere": "no such recipe",
    'grpo --data.train ["{folder}/nope.jsonl"]': "nope.jsonl' names no files",
    'grpo --data.train ["{folder}/empty.jsonl"]': "nothing to learn from: 0 rows",
    'grpo --data.train ["{folder}/one.jsonl"]': "1 held out (data.valid_fraction)",
    'grpo --data.train ["{folder}/numbers.jsonl"]': "line 1: 'prompt' must be a string or a list of messages",
    'dpo --data.train ["{folder}/sft.jsonl"]': "line 1: 'chosen' must be",
    'sft --data.train ["{folder}/pairs.jsonl"]': "preferences are read by algorithm = 'reward' or 'dpo'",
    "grpo --max-prompt 3 --too-long drop": "14 rows, 14 dropped",
    "grpo --from {folder}/rm/model": "is a reward model",
    "dpo --from {folder}/rm/model": "is a reward model",
    "ppo --from {folder}/rm/model": "is a reward model",
    "causal-judge": "has no score head",
    "no-file": "reward 'function': no such file",
    "grpo --seq-len 4096 --micro-tokens 4096": "data.seq_len is 4096, the model's context 512",
    "grpo --from {folder}/adapter": "holds adapters and no model: give the/base",
    "grpo --from {folder}/one.jsonl": "is not a directory",
    "grpo --from {folder}/mute --kind chat": "has no default chat template",
    "grpo --num-blocks 2": "rollout.num_blocks = 2 holds 32 tokens, and a prompt with its answer may have 44",
    "grpo --group 1": "nothing to compare an answer with",
    "grpo --output {folder}/one.jsonl": "run.output: ",
    f"grpo {' '.join(OVERLAP)} --rollout.remote.python /nowhere/python": "cannot be started: /nowhere/python",
    f"grpo {' '.join(OVERLAP)} --rollout.remote.python /bin/false": "the generator's process is gone (exit code 1)",
}


def open_files() -> set[str]:
    """What this process has open, and its threads and children."""
    me = psutil.Process()
    files = {f"{n} {os.readlink(f'/proc/self/fd/{n}')}" for n in os.listdir("/proc/self/fd") if _open(n)}
    threads = {thread.name for thread in threading.enumerate()}
    return files | threads | {str(child) for child in me.children(recursive=True)}


def _open(number: str) -> bool:
    path = Path(f"/proc/self/fd/{number}")
    return path.is_symlink() and not os.readlink(path).endswith("/fd")


@pytest.mark.parametrize("words", MISTAKES)
def test_a_mistake_is_one_line_and_exit_code_2(folder: Path, tmp_path: Path, capfd, words: str) -> None:
    name, *flags = words.format(folder=folder).split()
    output = [] if "--output" in flags else ["--output", str(tmp_path / "run")]
    before = open_files()
    assert main(["align", str(folder / f"{name}.toml"), *output, "--steps", "1", *flags]) == 2
    said = capfd.readouterr().err.strip()
    assert MISTAKES[words] in said and "Traceback" not in said
    assert said.count("\n") == 0, said
    assert open_files() <= before


def test_a_run_leaves_nothing_open(folder: Path, tmp_path: Path) -> None:
    run_here(folder / "grpo.toml", run__output=str(tmp_path / "first"), schedule__steps=1)  # what stays for good
    before = open_files()
    for number, flags in enumerate(((), OVERLAP, ("--quantization", "int8", "--correction.level", "token"))):
        words = ["align", str(folder / "grpo.toml"), "--output", str(tmp_path / str(number)), "--steps", "2", *flags]
        assert main(words) == 0
        assert open_files() <= before


def start(folder: Path, output: Path, *flags: str) -> subprocess.Popen[str]:
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-m", "twofold.cli", "align", str(folder / "grpo.toml"), "--output", str(output), *flags]
    return subprocess.Popen(words, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for(output: Path, steps: int) -> None:
    ends = time.monotonic() + 60
    log = output / "log.jsonl"
    while not (log.exists() and log.read_text().count('"loss"') >= steps):
        assert time.monotonic() < ends, "no steps came"
        time.sleep(0.05)


def ended(run: subprocess.Popen[str], children: list[psutil.Process], limit: float) -> str:
    """What a run said until it ended by itself, with all that it had started."""
    try:
        said, _ = run.communicate(timeout=limit)
    finally:
        run.kill()
    assert not psutil.wait_procs(children, timeout=5)[1]
    return said


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_in_the_middle_of_rollouts_gives_the_step_up(
    folder: Path, tmp_path: Path, monkeypatch, capsys, how: int
) -> None:
    """A step of minutes: the run saves what it had, at once."""
    groups, rung = Play._groups, list[float]()

    def ring() -> None:
        rung.append(time.monotonic())
        os.kill(os.getpid(), how)

    def rings(self: Play, *given):
        threading.Timer(0.5, ring).start()
        return groups(self, *given)

    monkeypatch.setattr(Play, "_groups", rings)
    run, before = tmp_path / "run", open_files()
    assert run_here(folder / "grpo.toml", run__output=str(run), data__prompts_per_step=4000) == 75
    assert time.monotonic() - rung[0] < 10
    assert "no step was done yet; the same command goes on from here" in capsys.readouterr().out
    assert open_files() <= before


def test_a_step_that_was_given_up_leaves_no_trace(folder: Path, tmp_path: Path, monkeypatch) -> None:
    changes = {"grpo__variant": "dapo", "grpo__mask_truncated": False, "grpo__beta": 0.0, "schedule__steps": 4}
    assert run_here(folder / "grpo.toml", run__output=str(tmp_path / "whole" / "run"), **changes) == 0
    harvest = Play.harvest

    def stopped(self: Play, trainer: Trainer, *given, **named):
        if trainer.position.step == 2:
            trainer.stop.asked = "SIGTERM"
        return harvest(self, trainer, *given, **named)

    monkeypatch.setattr(Play, "harvest", stopped)
    assert run_here(folder / "grpo.toml", run__output=str(tmp_path / "cut" / "run"), **changes) == 75
    monkeypatch.undo()
    assert run_here(folder / "grpo.toml", run__output=str(tmp_path / "cut" / "run"), **changes) == 0
    expected, found = outcome(tmp_path / "whole" / "run"), outcome(tmp_path / "cut" / "run")
    assert [key for key in expected | found if expected.get(key) != found.get(key)] == []


@pytest.mark.parametrize("flags", [OVERLAP, ("--quantization", "int8", "--correction.level", "token")])
def test_a_generator_that_is_killed_ends_the_run_with_one_word(folder: Path, tmp_path: Path, flags) -> None:
    run = start(folder, tmp_path / "run", "--steps", "2000", "--save-every", "2", "--eval-every", "9999", *flags)
    wait_for(tmp_path / "run", 3)
    children = psutil.Process(run.pid).children(recursive=True)
    (generator,) = [it for it in children if "twofold.align.generator" in it.cmdline()]
    generator.kill()
    said = ended(run, children, 20)
    assert run.returncode == 2 and "Traceback" not in said
    assert "the generator's process is gone (signal 9)" in said
    assert "the same command goes on from the newest checkpoint" in said


def test_the_same_directory_again(folder: Path, tmp_path: Path, capfd) -> None:
    def again(*flags: str) -> tuple[int, str]:
        words = ["align", str(folder / "grpo.toml"), "--output", str(tmp_path / "run"), *flags]
        code, said = main(words), capfd.readouterr()
        return code, said.out + said.err

    assert again("--steps", "2")[0] == 0
    code, said = again("--steps", "2")
    assert code == 0 and "finished, all 2 steps are done" in said
    code, said = again("--steps", "2", "--lr", "1e-4")
    assert code == 2 and "optimizer.lr was 0.003, is 0.0001" in said and "--fresh" in said
    assert again("--steps", "2", "--shown", "3")[0] == 0
    code, said = again("--steps", "2", "--lr", "1e-4", "--fresh")
    assert code == 0 and "going on from" not in said
    other = start(folder, tmp_path / "other", "--steps", "2000")
    wait_for(tmp_path / "other", 1)
    code, said = again("--output", str(tmp_path / "other"))
    assert code == 2 and "is in use by another run" in said
    other.terminate()
    assert other.wait(20) == 75
