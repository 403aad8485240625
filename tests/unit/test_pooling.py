"""PoolingEngine: batches of whole texts, ends of every kind, and a fair share beside generation."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.parity.tiny import SPECS
from tests.parity.tiny import decoder as decoder_of
from twofold.core import ConfigError, RequestError, StateError
from twofold.engine.capacity import forecast
from twofold.engine.config import EngineConfig
from twofold.engine.engine import Engine
from twofold.engine.pooler import Pooler
from twofold.engine.pooling import PoolingEngine
from twofold.engine.request import Output, Request, State
from twofold.engine.sampling import SamplingParams
from twofold.engine.vectors import Pooling
from twofold.models.decoder import Decoder
from twofold.models.sentences import Sentences

EMBED = Pooling(task="embed")
CONFIG = EngineConfig(max_num_batched_tokens=64, max_num_seqs=4, num_blocks=64, runner="pooling")


def text(name: str, length: int, **more) -> Request:
    ids = tuple(1 + (ord(name[0]) * 7 + 3 * i) % 120 for i in range(length))
    return Request(id=name, prompt_ids=ids, params=SamplingParams(), **({"pooling": EMBED} | more))


def pooling(decoder: Decoder | None = None, config: EngineConfig = CONFIG, **more) -> PoolingEngine:
    decoder = decoder or decoder_of(SPECS["llama"])
    return PoolingEngine(decoder, config, Pooler(decoder, Sentences(pooling="last")), **more)


def drain(engine: PoolingEngine | Engine) -> dict[str, Output]:
    found: dict[str, Output] = {}
    while engine.has_work:
        found |= {output.request_id: output for output in engine.step() if output.finish}
    return found


def test_batches_are_whole_texts_in_order() -> None:
    engine = pooling(config=replace(CONFIG, max_model_len=64))
    for name, length in (("a", 30), ("b", 30), ("c", 30), ("d", 1), ("e", 64)):
        engine.submit(text(name, length))
    steps = []
    while engine.has_work:
        steps.append("".join(output.request_id for output in engine.step()))
    assert steps == ["ab", "cd", "e"]


def test_priority_goes_first_when_it_counts() -> None:
    engine = pooling(config=replace(CONFIG, scheduling_policy="priority"))
    for name, priority in (("a", 5), ("b", 0), ("c", -1)):
        engine.submit(text(name, 60, priority=priority))
    order: list[str] = []
    while engine.has_work:
        order += [output.request_id for output in engine.step()]
    assert order == ["c", "b", "a"]


def test_a_text_longer_than_the_budget_goes_alone() -> None:
    engine = pooling()
    assert engine.tokens == 512
    for name, length in (("a", 10), ("b", 500), ("c", 10)):
        engine.submit(text(name, length))
    found = drain(engine)
    assert {output.finish for output in found.values()} == {State.STOP}
    alone = pooling()
    alone.submit(text("b", 500))
    assert drain(alone)["b"].pooled == found["b"].pooled


def test_ends() -> None:
    now = 100.0
    engine = pooling(clock=lambda: now)
    engine.submit(text("late", 5, deadline=90.0))
    engine.submit(text("gone", 5))
    engine.submit(text("good", 5, deadline=200.0))
    engine.abort("gone")
    engine.abort("nobody")
    found = drain(engine)
    assert {name: output.finish for name, output in found.items()} == {
        "late": State.TIMEOUT,
        "gone": State.ABORT,
        "good": State.STOP,
    }
    assert found["good"].pooled is not None and found["gone"].pooled is None
    assert engine.stats().finished == {"timeout": 1, "abort": 1, "stop": 1}


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        (text("a", 0), "no tokens"),
        (text("a", 513), "513 tokens and the context is 512"),
        (replace(text("a", 3), prompt_ids=(1, 131)), "token id 131"),
        (replace(text("a", 3), prompt_ids=(1, -1)), "token id -1"),
        (text("a", 3, types=(0, 1, 0)), "from 0 to 0"),
        (text("a", 3, types=(0,)), "one for each token"),
        (text("a", 3, pooling=Pooling(task="classify")), "not classify"),
        (text("a", 3, pooling=Pooling(task="embed", dimensions=45)), "1 to 44"),
        (text("a", 3, pooling=Pooling(task="token_embed", dimensions=4)), "dimensions"),
        (text("a", 3, pooling=None), "no text"),
        (text("a", 3, adapter="other"), "adapters"),
    ],
)
def test_what_is_refused(wrong: Request, match: str) -> None:
    engine = pooling()
    with pytest.raises(RequestError, match=match):
        engine.submit(wrong)
    assert not engine.has_work


def test_an_id_is_taken_once() -> None:
    engine = pooling()
    engine.submit(text("a", 3))
    with pytest.raises(RequestError, match="already running"):
        engine.submit(text("a", 3))


def test_numbers_that_are_not_finite_are_their_own_texts_affair() -> None:
    decoder = decoder_of(SPECS["llama"])
    with torch.no_grad():
        decoder.embed.weight[130] = torch.nan
    engine = pooling(decoder)
    engine.submit(text("a", 9))
    engine.submit(replace(text("b", 9), prompt_ids=(4, 130, 9)))
    engine.submit(text("c", 9))
    found = drain(engine)
    assert found["b"].finish is State.ERROR and "not finite" in (found["b"].error or "")
    again = pooling()
    again.submit(text("c", 9))
    assert drain(again)["c"].pooled == found["c"].pooled


def test_new_weights_and_sleep() -> None:
    engine = pooling()
    engine.submit(text("a", 9))
    before = drain(engine)["a"]
    with torch.no_grad():
        engine.decoder.embed.weight[:] = engine.decoder.embed.weight.flip(0)
    engine.load_weights(None, 1)
    with pytest.raises(ConfigError, match="not above 1"):
        engine.load_weights(None, 1)
    engine.submit(text("a", 9))
    engine.sleep()
    with pytest.raises(StateError, match="sleeps"):
        engine.step()
    engine.wake()
    after = drain(engine)["a"]
    assert after.version == 1 and after.pooled != before.pooled


# --------------------------------------------------------------------------------------------- beside generation
def both() -> Engine:
    decoder = decoder_of(SPECS["llama"])
    config = replace(CONFIG, runner="generate", convert="embed")
    return Engine(decoder, config, pooler=Pooler(decoder, Sentences(pooling="last")))


def prompt(name: str, length: int, tokens: int = 12) -> Request:
    params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
    return replace(text(name, length), params=params, pooling=None)


def generated(engine: Engine) -> tuple[dict[str, list[int]], dict[str, Output]]:
    said: dict[str, list[int]] = {}
    pooled: dict[str, Output] = {}
    while engine.has_work:
        for output in engine.step():
            said.setdefault(output.request_id, []).extend(token.id for token in output.tokens)
            if output.pooled:
                pooled[output.request_id] = output
    return said, pooled


def test_one_engine_does_both_with_the_bits_of_each_alone() -> None:
    engine = both()
    assert engine.abilities.generates and engine.abilities.tasks == ("embed", "token_embed")
    for name in "pqr":
        engine.submit(prompt(name, 30))
        engine.submit(text(name + "'", 50))
    said, pooled = generated(engine)
    alone = both()
    for name in "pqr":
        alone.submit(prompt(name, 30))
    assert {name: said[name] for name in "pqr"} == generated(alone)[0]
    for name in "pqr":
        one = pooling()
        one.submit(text(name + "'", 50))
        assert drain(one)[name + "'"].pooled == pooled[name + "'"].pooled


def test_neither_starves_the_other() -> None:
    """Long texts wait until pooling has saved up for them; prompts go on meanwhile."""
    engine = both()
    for i in range(4):
        engine.submit(prompt("pqrs"[i], 100, tokens=40))
    for i in range(30):
        engine.submit(text(f"{chr(97 + i % 26)}{i}", 60))
    tokens, texts, steps = 0, 0, 0
    while texts < 30 and steps < 200:
        for output in engine.step():
            tokens += len(output.tokens)
            texts += output.pooled is not None
        steps += 1
        if not engine.scheduler.has_work:
            break
    assert steps < 200 and tokens == 160, "generation ended while texts were waiting"
    assert texts >= 10, "and texts were read meanwhile"
    assert engine.scheduler.budget >= engine.config.max_num_seqs


def test_a_generating_engine_says_how_to_get_vectors() -> None:
    engine = Engine(decoder_of(SPECS["llama"]), replace(CONFIG, runner="generate"))
    with pytest.raises(RequestError, match="--convert embed"):
        engine.submit(text("a", 3))


def test_the_sum_of_bytes_has_no_cache() -> None:
    spec = SPECS["llama"]
    found = forecast(spec, CONFIG, 1 << 30)
    assert found.fits and found.pooling and found.kv_bytes == 0 and found.context == spec.max_len
    beside = forecast(spec, replace(CONFIG, runner="generate", convert="embed"), 1 << 30)
    assert beside.activations > forecast(spec, replace(CONFIG, runner="generate"), 1 << 30).activations
    tight = forecast(spec, CONFIG, found.total - 1)
    assert not tight.fits and "max-model-len" in tight.fix
