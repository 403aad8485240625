"""The door, walked through as a user does: commands on a checkpoint that transformers saved."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from twofold import cli
from twofold.engine.capacity import RUNTIME
from twofold.platforms import Memory

ROOT = Path(__file__).resolve().parents[2]
PROMPT = "def read(path):\n    return open(path"
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}> {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<bot> {% endif %}"
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with a byte-level tokenizer and a chat template, as transformers saves them."""
    place = tmp_path_factory.mktemp("checkpoint") / "tiny"
    words = Tokenizer(models.BPE())
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<s>", "</s>"]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet)
    words.train_from_iterator([Path(os.__file__).read_text()], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="</s>")
    fast.chat_template = TEMPLATE
    fast.save_pretrained(place)
    torch.manual_seed(3)
    config = LlamaConfig(
        hidden_size=48,
        num_hidden_layers=2,
        intermediate_size=96,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=400,
        max_position_embeddings=160,
        initializer_range=0.3,
        bos_token_id=0,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(place)
    return place


def said(capsys: pytest.CaptureFixture[str], *argv: str | Path) -> str:
    """What a command prints, run in this process; it must succeed."""
    code = cli.main([str(word) for word in argv])
    out = capsys.readouterr()
    assert code == 0, out.err
    return out.out


def expected(checkpoint: Path, prompt: str, new: int) -> str:
    """What transformers' own generate says after the prompt."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    given = tokenizer(prompt, return_tensors="pt")
    ids = model.generate(**given, max_new_tokens=new)[0, given.input_ids.shape[1] :]
    text: str = tokenizer.decode(ids, skip_special_tokens=True)
    return text


# ------------------------------------------------------------------------------------------------ generate
def test_generate_prints_what_transformers_prints(checkpoint: Path) -> None:
    """The command as a user types it, in a process of its own."""
    command = [sys.executable, "-m", "twofold", "generate", "--model", str(checkpoint), "--prompt", PROMPT]
    done = subprocess.run([*command, "--max-tokens", "40"], capture_output=True, text=True, cwd=ROOT, check=True)
    text = expected(checkpoint, PROMPT, 40)
    assert len(set(text)) > 5, "the toy model should say something worth comparing"
    assert done.stdout == text + "\n"


def test_generate_follows_the_checkpoints_generation_config(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A repetition penalty and a length written in generation_config.json count, as they do for transformers."""
    other = tmp_path / "other"
    shutil.copytree(checkpoint, other)
    path = other / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"repetition_penalty": 1.4, "max_new_tokens": 23}))
    text = expected(other, PROMPT, 23)
    assert said(capsys, "generate", "--model", other, "--prompt", PROMPT) == text + "\n"
    assert text != expected(checkpoint, PROMPT, 23)


def test_generate_samples_when_the_checkpoint_says_so(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    shutil.copytree(checkpoint, other)
    (other / "generation_config.json").write_text('{"do_sample": true, "temperature": 1.5, "eos_token_id": 1}')
    flags = ["generate", "--model", other, "--prompt", PROMPT, "--max-tokens", "16", "--seed"]
    once, again, else_ = (said(capsys, *flags, seed) for seed in ("7", "7", "8"))
    assert once == again != else_
    assert once != said(capsys, *flags, "7", "--temperature", "0")


def test_generate_reads_standard_input_and_echoes(
    checkpoint: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = said(capsys, "generate", "--model", checkpoint, "--prompt", PROMPT, "--max-tokens", "8")
    monkeypatch.setattr("sys.stdin", io.StringIO(PROMPT))
    flags = ["--prompt", "-", "--max-tokens", "8", "--echo"]
    assert said(capsys, "generate", "--model", checkpoint, *flags) == PROMPT + plain


# ------------------------------------------------------------------------------------------------ capacity
def squeeze(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    """Let every room that asks see this many bytes."""
    for place in ("twofold.platforms.memory", "twofold.commands.plan"):
        monkeypatch.setattr(f"{place}.read_memory", lambda: Memory(total=2 * free, available=free, limit="a test"))


def test_plan_and_generate_agree_on_what_fits(
    checkpoint: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "fits          yes" in said(capsys, "plan", checkpoint)
    squeeze(monkeypatch, RUNTIME + 8 * 2**20)
    monkeypatch.setattr("twofold.engine.opening.load", lambda *_, **__: pytest.fail("loaded although it does not fit"))
    assert cli.main(["plan", str(checkpoint)]) == 1
    plan = capsys.readouterr().out
    assert cli.main(["generate", "--model", str(checkpoint), "--prompt", PROMPT]) == 2
    refusal = capsys.readouterr().err
    assert len(refusal.splitlines()) == 1
    fix = refusal.split(": ")[-1].strip()
    assert fix in plan
    monkeypatch.undo()
    squeeze(monkeypatch, RUNTIME + 8 * 2**20)
    flags = fix.split()
    assert cli.main(["generate", "--model", str(checkpoint), "--prompt", PROMPT, "--max-tokens", "4", *flags]) == 0


def test_plan_counts_the_checkpoints_bytes(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    size = sum(p.numel() for p in model.parameters()) * 4
    out = said(capsys, "plan", checkpoint)
    assert f"weights       {size / 1024:.1f} KiB" in out
    assert f"checkpoint    {size / 1024:.1f} KiB on disk" in out


# ------------------------------------------------------------------------------------------------ doctor, kernels
def test_doctor_names_what_it_found_and_what_is_missing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("twofold.commands.doctor.find_compiler", lambda: None)
    out = said(capsys, "doctor")
    assert re.search(rf"torch +{re.escape(torch.__version__)}", out)
    assert "cores for this process" in out
    assert "a C++ compiler: " in out


def test_doctor_knows_every_dependency() -> None:
    import tomllib

    from twofold.commands.doctor import NEEDED

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {re.split(r"[><=;]", name)[0].strip() for name in project["dependencies"]} == set(NEEDED)


def test_kernels_lists_every_op_with_a_reason(capsys: pytest.CaptureFixture[str]) -> None:
    from twofold.kernels import all_ops

    lines = said(capsys, "kernels", "--no-measure").splitlines()
    for op in all_ops():
        line = next(line for line in lines if line.startswith(f"{op.name} "))
        name, _, why = op.serving()
        assert line.split()[1] == name
        assert why in line


# ------------------------------------------------------------------------------------------------ serve and chat
@pytest.fixture(scope="module")
def url(checkpoint: Path) -> Iterator[str]:
    """A server started by the door on a free port, stopped by SIGTERM, which it must follow with exit code 0."""
    command = [sys.executable, "-m", "twofold", "serve", str(checkpoint), "--port", "0"]
    env = os.environ | {"TWOFOLD_API_KEY": "a-key-of-some-length"}
    process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        found = (re.search(r"OpenAI API: (http://127\.0\.0\.1:\d+)/v1", line) for line in process.stdout)
        yield next(match[1] for match in found if match)
    finally:
        process.send_signal(signal.SIGTERM)
        code = process.wait(timeout=60)
    assert code == 0


def test_chat_says_the_same_here_and_through_the_server(
    checkpoint: Path, url: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TWOFOLD_API_KEY", "a-key-of-some-length")
    answers = []
    for where in (["--model", str(checkpoint)], ["--url", url]):
        monkeypatch.setattr("sys.stdin", io.StringIO("hello\nand now?\n/reset\nhello\n/exit\nnever read\n"))
        answers.append(said(capsys, "chat", *where, "--temperature", "0", "--max-tokens", "12"))
    assert answers[0] == answers[1]
    assert answers[0].strip()


def test_chat_tells_what_the_server_says(
    url: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TWOFOLD_API_KEY", "a-wrong-key")
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n"))
    assert cli.main(["chat", "--url", url]) == 2
    assert "the server answers 401" in capsys.readouterr().err


def test_chat_without_a_server_says_so(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n"))
    assert cli.main(["chat", "--url", "http://127.0.0.1:9"]) == 2
    assert "is `twofold serve` running?" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------ bench
def test_throughput_measures_both_sides(checkpoint: Path, tmp_path: Path) -> None:
    record = tmp_path / "record.json"
    command = [sys.executable, "-m", "twofold", "bench", "throughput", "--model", str(checkpoint), "--quick"]
    flags = ["--requests", "3", "--threads", "1", "--json", str(record)]
    done = subprocess.run([*command, *flags], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    found = json.loads(record.read_text())
    assert found["output_tokens_s"] > 0 < found["peer_output_tokens_s"]
    assert 0 <= found["kv_waste"] < 1
    assert found["same_tokens"] == 1.0, "two engines on one checkpoint, greedy in fp32: the tokens should agree"
    assert "times transformers" in done.stdout


def test_a_start_is_measured_beside_what_it_waits_for(checkpoint: Path, tmp_path: Path) -> None:
    record = tmp_path / "record.json"
    command = [sys.executable, "-m", "twofold", "bench", "start", "--model", str(checkpoint), "--quick"]
    done = subprocess.run([*command, "--json", str(record)], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    found = json.loads(record.read_text())
    assert all(len(found[side]) == 1 and found[side][0] > 0 for side in ("torch", "read", "cold", "warm"))
    assert found["bytes"] == sum(path.stat().st_size for path in checkpoint.glob("*.safetensors"))
    assert "first token beyond reading the file" in done.stdout


def test_latency_and_limits_run(checkpoint: Path) -> None:
    for name, *flags in (["latency", "--model", str(checkpoint)], ["limits"]):
        command = [sys.executable, "-m", "twofold", "bench", name, "--quick", "--threads", "1", *flags]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 0, done.stderr
        assert "GB/s read" in done.stdout
