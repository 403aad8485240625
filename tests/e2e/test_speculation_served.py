"""Speculation from the door to the text: flags and settings, LLM, a server whose model is killed, its metrics."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from pathlib import Path
from typing import Any

import httpx
import pytest
from served import Served, served

from twofold import LLM, SamplingParams
from twofold.cli import main
from twofold.core import ConfigError
from twofold.engine.config import SpeculativeConfig

PROMPTS = ["for i in range(3):\n    print(i)\nfor i in range(3):\n", "The quick brown fox", "def add(a, b):\n"]


def said(folder: Path, **speculative: Any) -> tuple[LLM, list[tuple[int, ...]]]:
    llm = LLM(folder, num_blocks=200, max_num_seqs=4, speculative=SpeculativeConfig(**speculative))
    params = [
        SamplingParams(temperature=temperature, seed=3, max_tokens=60, ignore_eos=True, n=2)
        for temperature in (0.0, 0.0, 0.9)
    ]
    found = llm.generate(PROMPTS, params, progress=False)
    return llm, [sample.token_ids for completion in found for sample in completion.outputs]


def test_every_method_writes_what_none_writes(tiny: Path) -> None:
    _, calm = said(tiny)
    for wanted in (
        {"method": "ngram", "prompt_lookup_min": 2},
        {"method": "suffix", "adaptive": False},
        {"method": "draft_model", "model": str(tiny), "num_speculative_tokens": 3, "adaptive": False},
    ):
        llm, texts = said(tiny, **wanted)
        assert texts == calm, wanted
        assert llm.engine.stats().draft_tokens > 0, wanted
    assert llm.engine.stats().acceptance > 0.9, "the draft is the model"


def test_the_command_line_takes_it(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["generate", "--model", str(tiny), "--prompt", PROMPTS[0], "--max-tokens", "30", "--ignore-eos"]
    said = []
    for flags in ([], ["--speculative-config", '{"method": "ngram"}'], ["--speculative.method", "suffix"]):
        assert main([*asked, *flags]) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] == said[2] != ""


def test_settings_that_cannot_be_are_refused(tiny: Path) -> None:
    for wanted, message in (
        ({"method": "draft_model"}, "give both or neither"),
        ({"method": "ngram", "prompt_lookup_min": 4, "prompt_lookup_max": 2}, r"must be in \[4, 64\], not 2"),
        ({"method": "ngrams"}, "did you mean 'ngram'"),
        ({"num_speculative_token": 3}, "did you mean 'speculative.num_speculative_tokens'"),
    ):
        with pytest.raises(ConfigError, match=message):
            LLM(tiny, speculative=wanted)


async def texts(server: Served, kill: bool) -> list[str]:
    async def one(http: httpx.AsyncClient, seed: int) -> str:
        body = {"prompt": PROMPTS[seed % 3], "seed": seed, "max_tokens": 300, "temperature": 0.7 * (seed % 2)}
        answer = await http.post("/v1/completions", json={**body, "ignore_eos": True})
        return str(answer.json()["choices"][0]["text"])

    async with httpx.AsyncClient(base_url=server.url, timeout=60, trust_env=False) as http:
        asked = [asyncio.create_task(one(http, seed)) for seed in range(6)]
        while kill and sum(row["output_tokens"] for row in (await http.get("/stats")).json()["requests"]) < 60:
            assert not all(task.done() for task in asked), "over before anything happened"
            await asyncio.sleep(0.01)
        if kill:
            os.kill(server.worker.pid, signal.SIGKILL)
        return list(await asyncio.gather(*asked))


def test_a_server_that_guesses_goes_on_after_its_model_was_killed(tiny: Path) -> None:
    watch = {"late": 1.0, "dead": 2.0, "backoff": 0.05}
    with served(tiny) as plain:
        calm = asyncio.run(texts(plain, kill=False))
    speculative = {"method": "suffix", "adaptive": False, "num_speculative_tokens": 5}
    with served(tiny, watch=watch, engine={"speculative": speculative}) as server:
        assert asyncio.run(texts(server, kill=True)) == calm
        assert server.stats()["engine_restarts_total"] == 1
        server.wait(server.idle)
        counts = {
            line.split("{")[0]: float(line.split()[-1])
            for line in server.http.get("/metrics").text.splitlines()
            if line.startswith("vllm:spec_decode_num") and "_per_pos" not in line
        }
        per_pos = [line for line in server.http.get("/metrics").text.splitlines() if "_per_pos_total{" in line]
    drafts, tokens, right = (
        counts[f"vllm:spec_decode_num_{name}_total"] for name in ("drafts", "draft_tokens", "accepted_tokens")
    )
    assert 0 < right < tokens <= 5 * drafts
    assert len(per_pos) == 5 and 'position="0"' in per_pos[0]
    assert sum(float(line.split()[-1]) for line in per_pos) == right


def test_the_benchmark_compares_sides_that_write_the_same(tiny: Path, tmp_path: Path) -> None:
    record = tmp_path / "record.json"
    flags = ["--quick", "--threads", "1", "--model", str(tiny), "--draft", str(tiny), "--json", str(record)]
    assert main(["bench", "speculation", *flags]) == 0
    sides = json.loads(record.read_text())["sides"]
    drafted = ["draft model", "draft model fixed 4"]
    assert list(sides) == ["none", "ngram", "ngram fixed 4", "suffix", "suffix shared", *drafted]
    assert sides["none"]["whole"] == 1.0 and sides["none"]["tokens_per_step"] < 1.1
    assert sides["ngram fixed 4"]["acceptance"] is not None and len(sides["ngram"]["ratios"]) == 3
