"""The benchmark of adapters: who has which, steps that take turns, and ratios against the plain engine's."""

from __future__ import annotations

from pathlib import Path

import adapters as bench
import pytest

from twofold.models import Decoder, spec_from
from twofold.train.init import init_weights


def test_every_engine_runs_its_adapters_and_takes_its_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 120, "hidden_size": 32}
    sizes = {"intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2, "rms_norm_eps": 1e-5}
    decoder = Decoder(spec_from(config | sizes | {"max_position_embeddings": 128}))
    init_weights(decoder, 0)
    monkeypatch.setattr(bench, "PROMPT", 40)
    monkeypatch.setattr(bench, "BATCHES", (9,))
    ticks = iter(range(10_000))
    made = bench.Bench(decoder, tmp_path, 4, "float32", lambda: float(next(ticks)))
    seen: dict[str, set[int]] = {name: set() for name in made.engines}
    for name, engine in made.engines.items():
        execute = engine.runner.execute
        monkeypatch.setattr(
            engine.runner,
            "execute",
            lambda plan, *more, name=name, execute=execute: (
                seen[name].update(chunk.adapter for chunk in plan.chunks),
                execute(plan, *more),
            )[1],
        )
    for found in (made.decode(9, 4), made.prefill(8)):
        told = bench.ratios(found)
        assert all(row["ratio"] == 1.0 and row["ms"] == 1000.0 for row in told.values())
    plain, unused, one, mixed = seen.values()
    assert plain == unused == {0} and len(one) == 1 and len(mixed) == 8 and 0 not in one | mixed


def test_a_ratio_is_of_the_step_beside_it() -> None:
    found = {bench.PLAIN: [1.0, 10.0, 1.0, 10.0, 1.0], "other": [2.0, 20.0, 2.0, 20.0, 2.0]}
    assert bench.ratios(found)["other"] == {"ms": 2000.0, "ratio": 2.0, "low": 2.0, "high": 2.0}
