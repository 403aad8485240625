"""A checkpoint three times larger than what its process may take answers a batch of 64, and is served over HTTP.

The limit is RLIMIT_DATA, on what the process takes beyond its libraries: private memory, from the heap or mapped.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from served import served
from tiny_checkpoint import make_checkpoint

from twofold import cli
from twofold.engine.llm import LLM
from twofold.engine.sampling import SamplingParams
from twofold.models import Decoder, LoraConfig, load, save, save_adapter, spec_from
from twofold.models.lora import adapt, pair_parameters

ROOT = Path(__file__).resolve().parents[2]
LAYERS = 6
ONE = 4 * (64 * (64 + 2 * 32) + 64 * 64 + 3 * 64 * 128 + 2 * 64) + 4096
"""Bytes of a layer, in whole pages, and a little."""


@pytest.fixture(scope="module")
def deep(tmp_path_factory) -> Path:
    """The tiny checkpoint with more layers."""
    folder = make_checkpoint(tmp_path_factory.mktemp("streamed") / "model")
    config = json.loads((folder / "config.json").read_text()) | {"num_hidden_layers": LAYERS}
    decoder = Decoder(spec_from(config))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    save(decoder, folder, config=config)
    return folder


def test_three_times_the_limit(tmp_path: Path) -> None:
    record = tmp_path / "record.json"
    flags = ["--quick", "--threads", "1", "--directory", str(tmp_path), "--json", str(record)]
    done = subprocess.run(
        [sys.executable, "-m", "twofold", "bench", "streamed", *flags],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(record.read_text())
    assert found["same_bits"] and "could not be had" in found["refused"]
    assert found["checkpoint"] >= 3 * found["limit"]
    streamed = found["streamed"]
    assert streamed["private"] <= found["limit"]
    (batch,) = streamed["batches"]
    assert batch["requests"] == 64 and batch["tokens"] == 64 * 8
    passes = batch["read"][0] / found["checkpoint"]
    assert batch["steps"][0] - 2 < passes < batch["steps"][0] + 1 and passes < 20  # the whole batch shares a pass
    assert 0 < batch["share"] < 1.5
    if streamed["past_cache"]:
        assert streamed["cached"] < found["checkpoint"] // 10


def test_what_else_is_done_with_a_model_has_the_same_bits(deep: Path, tmp_path: Path) -> None:
    decoder = load(deep)
    adapt(decoder, LoraConfig(rank=3, alpha=8.0), seed=1)
    with torch.no_grad():
        for name, parameter in pair_parameters(decoder).items():
            if name.endswith(".b"):
                parameter.fill_(0.1)
    save_adapter(decoder, tmp_path / "adapter")
    stream = {"weights": "stream", "weights_memory_bytes": 3 * ONE, "offload_dir": str(tmp_path / "offload")}
    said = []
    for how in ({}, stream):
        llm = LLM(deep, num_blocks=64, enable_lora=True, speculative={"method": "suffix"}, **how)
        llm.load_adapter("a", tmp_path / "adapter")
        params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True, logprobs=0)
        answers = llm.generate(["one", "two two two", "three"], params, adapter=["a", None, "a"], progress=False)
        texts = LLM(deep, runner="pooling", pooling="last", **how)
        said.append(([answer.outputs[0].logprobs for answer in answers], texts.embed(["one", "another text"])))
        kept = llm.engine.decoder.stream
        assert (kept is not None and len(kept.kept) == 1) if how else kept is None
    assert said[0] == said[1]


def test_it_is_served_planned_and_leaves_at_once(deep: Path, tmp_path: Path, capsys) -> None:
    how = {"weights": "stream", "weights_memory_bytes": 2 * ONE, "offload_dir": str(tmp_path / "offload")}
    flags = [word for name, value in how.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    assert cli.main(["plan", str(deep), *flags]) == 0
    assert "streamed      0 of 6 layers stay in memory" in capsys.readouterr().out
    (want,) = LLM(deep).generate(["hello there"], SamplingParams(temperature=0.0, max_tokens=12), progress=False)
    with served(deep, engine=how) as server:
        body = {"prompt": "hello there", "temperature": 0, "max_tokens": 12}
        said = server.http.post("/v1/completions", json=body).json()
        assert said["choices"][0]["text"] == want.outputs[0].text
        endless = body | {"max_tokens": 400, "ignore_eos": True, "stream": True, "n": 8, "temperature": 1}
        with server.http.stream("POST", "/v1/completions", json=endless) as answer:
            next(answer.iter_lines())
            began = time.monotonic()
            server.process.send_signal(signal.SIGTERM)
            server.process.send_signal(signal.SIGTERM)
            server.process.wait(timeout=20)
            assert time.monotonic() - began < 10
    (file,) = (tmp_path / "offload").iterdir()
    assert file.suffix == ".weights"


def test_what_cannot_be(deep: Path, tmp_path: Path, capsys) -> None:
    assert cli.main(["plan", str(deep), "--weights-memory-bytes", "9"]) == 2
    assert "add weights stream" in capsys.readouterr().err
    where = ["--weights", "stream", "--offload-dir", str(tmp_path)]
    command = ["generate", "--model", str(deep), "--prompt", "x", "--max-tokens", "1", *where]
    assert cli.main([*command, "--weights-memory-bytes", "9"]) == 2
    assert "2 layers at once need" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert cli.main([*command[:-1], str(tmp_path / "file" / "in")]) == 2
    assert "--offload-dir" in capsys.readouterr().err
