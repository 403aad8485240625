"""A disk behind a served model's cache: found after the model's death and after a restart, and told of."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

from served import Served, served

from twofold import LLM, SamplingParams

PROMPT = "def add(a, b):\n    return a + b\n" * 12


def ask(server: Served, prompt: str = PROMPT) -> tuple[str, int]:
    body = {"model": "tiny", "prompt": prompt, "max_tokens": 12, "temperature": 0, "ignore_eos": True}
    answer = server.http.post("/v1/completions", json=body).json()
    details: dict[str, Any] = answer["usage"].get("prompt_tokens_details") or {}
    return answer["choices"][0]["text"], details.get("cached_tokens", 0)


def counted(server: Served, name: str) -> float:
    lines = server.http.get("/metrics").text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith(f"{name}_total{{"))


def test_a_prefix_outlives_the_model_and_the_server(tiny: Path, tmp_path: Path) -> None:
    engine = {"kv_offload_dir": str(tmp_path / "kv"), "kv_host_bytes": 1 << 20}
    with served(tiny, engine=engine) as server:
        text, cached = ask(server)
        assert cached == 0
        again, cached_now = ask(server)
        assert again == text and cached_now > 50
        server.wait(lambda: server.stats()["kv_tiers"]["disk"]["stored_bytes"] > 0)
        os.kill(server.worker.pid, signal.SIGKILL)
        server.wait(lambda: server.http.get("/readyz").status_code == 200)
        assert ask(server) == (text, cached_now), "found by the process that was started instead"
        server.wait(lambda: counted(server, "vllm:external_prefix_cache_hits") == cached_now)
        assert counted(server, "vllm:external_prefix_cache_queries") > cached_now
        assert counted(server, "twofold:kv_tier_hits") == cached_now
        assert counted(server, "twofold:kv_tier_errors") == 0
    with served(tiny, engine=engine) as server:
        assert ask(server) == (text, cached_now), "found after a restart"
        assert ask(server, "else " + PROMPT)[1] == 0


def test_llm_finds_what_the_server_or_another_llm_left(tiny: Path, tmp_path: Path) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
    said = []
    for _ in range(2):
        llm = LLM(tiny, num_blocks=256, kv_offload_dir=str(tmp_path / "kv"))
        said.append(llm.generate(PROMPT, params, progress=False)[0].outputs[0].text)
        stats = llm.engine.stats()
        llm.engine.close()
    assert said[0] == said[1]
    assert stats.external_hits > 50 and stats.tiers["disk"]["errors"] == 0
