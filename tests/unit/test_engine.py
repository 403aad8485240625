"""The engine's verbs around its scheduler: weights, sleep, broken numbers, what it counts."""

from __future__ import annotations

import pytest
import torch

from tests.parity import tiny
from twofold.core import CapacityError, CheckpointError, ConfigError, RequestError, StateError
from twofold.engine.config import EngineConfig
from twofold.engine.engine import Engine
from twofold.engine.request import Request, State
from twofold.engine.sampling import SamplingParams
from twofold.models.weights import decoder_tensors, spec_from

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": tiny.VOCAB,
    "hidden_size": 40,
    "intermediate_size": 52,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}


def ask(name, prompt, **params):
    usual = {"temperature": 0.0, "max_tokens": 8, "ignore_eos": True, "logprobs": 0}
    return Request(id=name, prompt_ids=tuple(prompt), params=SamplingParams(**(usual | params)))


@pytest.fixture
def model():
    return tiny.decoder(spec_from(CONFIG))


def test_new_weights_replace_all_that_the_old_ones_computed(model):
    other = tiny.decoder(spec_from(CONFIG))
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(-0.7)
    engine, prompt = tiny.engine(model), range(40)
    first = tiny.run(engine, ask("a", prompt))["a"]
    engine.load_weights(decoder_tensors(other), version=1)
    fresh = ask("a", prompt)
    second = tiny.run(engine, fresh)["a"]
    assert fresh.num_cached == 0 and second != first
    assert second == tiny.run(tiny.engine(other), ask("a", prompt))["a"]
    assert engine.stats().version == 1


def test_versions_only_grow_and_half_a_load_stops_the_engine(model):
    engine = tiny.engine(model)
    with pytest.raises(ConfigError, match="not above 0"):
        engine.load_weights([], version=0)
    engine.submit(ask("a", range(5)))
    with pytest.raises(CheckpointError):
        engine.load_weights(list(decoder_tensors(model))[:3], version=1)
    with pytest.raises(StateError, match="half-way"):
        engine.step()
    engine.load_weights(decoder_tensors(tiny.decoder(spec_from(CONFIG))), version=1)
    while engine.has_work:
        outputs = engine.step()
    assert outputs[-1].finish is State.LENGTH


def test_a_sleeping_engine_holds_no_cache_and_does_not_step(model):
    engine = tiny.engine(model)
    engine.submit(ask("a", range(5)))
    engine.step()
    engine.sleep()
    assert engine.asleep and engine.stats().asleep and engine.stats().blocks_used == 0
    with pytest.raises(StateError, match="wake"):
        engine.step()
    engine.submit(ask("b", range(5)))
    engine.wake()
    said = tiny.Said()
    while engine.has_work:
        said.hear(engine.step())
    assert {output.finish for output in said.ends.values()} == {State.LENGTH}


def test_numbers_that_are_not_finite_end_one_request_and_leave_nothing_behind(model):
    clean = tiny.run(tiny.engine(model), ask("good", range(10, 30)), ask("later", range(40, 80)))
    with torch.no_grad():
        model.embed.weight[99] = torch.inf
    engine = tiny.engine(model, num_blocks=6, enable_prefix_caching=False)
    said = tiny.run(engine, ask("bad", [1, 99, *range(2, 20)]), ask("good", range(10, 30)))
    assert said.ends["bad"].finish is State.ERROR and "not finite" in said.ends["bad"].error
    assert said["bad"] == [] and said["good"] == clean["good"]
    assert tiny.run(engine, ask("later", range(40, 80)))["later"] == clean["later"], "its blocks held a NaN before"


def test_a_broken_prefix_is_never_shared(model):
    with torch.no_grad():
        model.embed.weight[99] = torch.nan
    engine = tiny.engine(model)
    prompt = [99, *range(40)]
    said = tiny.run(engine, ask("a", prompt), ask("b", prompt))
    assert [said.ends[name].finish for name in "ab"] == [State.ERROR] * 2
    assert engine.pool.cached == 0


def test_it_counts_what_it_does(model):
    engine = tiny.engine(model)
    tiny.run(engine, ask("a", range(20)), ask("b", range(50, 70)))
    engine.submit(ask("c", range(20)))
    engine.step()
    now = engine.stats()
    assert (now.running, now.waiting, now.blocks) == (1, 0, 400)
    assert now.blocks_used == 2 and 0 < now.kv_usage < 0.01
    assert (now.prompt_tokens, now.generation_tokens) == (60, 17)
    assert (now.prefix_queries, now.prefix_hits) == (60, 16)
    assert now.computed_tokens == 2 * (20 + 7) + 4
    assert now.steps == 9 and now.busy_seconds > 0 and now.step_tokens == 4
    assert now.finished == {"length": 2}
    engine.abort("c")
    engine.step()
    assert engine.stats().finished == {"length": 2, "abort": 1}


def test_an_idle_engine_checks_itself(model):
    engine = tiny.engine(model)
    engine.submit(ask("a", range(5), max_tokens=2))
    engine.step()
    engine.pool.allocate(1)  # a leak
    with pytest.raises(StateError, match="holders"):
        engine.step()


def test_limits_are_those_of_model_and_cache(model):
    with pytest.raises(ConfigError, match="256 at most"):
        tiny.engine(model, max_model_len=257)
    with pytest.raises(RequestError, match="context 64"):
        tiny.engine(model, max_model_len=64).submit(ask("a", [1] * 64))
    small = Engine(model, EngineConfig(kv_cache_memory_bytes=40_000, max_num_seqs=4))
    assert small.stats().blocks == 40_000 // (2 * 2 * 2 * 10 * 4 * 16)
    with pytest.raises(CapacityError, match="lower max_tokens"):
        small.submit(ask("a", [1] * 20, max_tokens=100))
    with pytest.raises(ConfigError, match="one block"):
        Engine(model, EngineConfig(kv_cache_memory_bytes=100))


def test_a_cache_of_unsaid_size_fits_the_machine(model):
    engine = Engine(model, EngineConfig(max_num_seqs=4))
    assert engine.stats().blocks == 4 * 256 // 16


def test_a_step_that_raised_can_be_taken_again(model, monkeypatch):
    calm = tiny.run(tiny.engine(model), ask("a", range(20)), ask("b", range(50, 70)))
    engine, said = tiny.engine(model), tiny.Said()
    for name, prompt in (("a", range(20)), ("b", range(50, 70))):
        engine.submit(ask(name, prompt))
    said.hear(engine.step())
    with monkeypatch.context() as patch:
        patch.setattr(type(engine.runner), "_logits", lambda *_: (_ for _ in ()).throw(MemoryError("out of memory")))
        with pytest.raises(MemoryError):
            engine.step()
    engine.scheduler.check_integrity()
    while engine.has_work:
        said.hear(engine.step())
    assert said == calm
