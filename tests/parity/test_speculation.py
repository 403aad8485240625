"""Speculation is exact: whoever guesses, whatever is asked of the sampler, the text is that of a token a step."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch

from tests.parity import tiny
from tests.parity.prophet import foretold
from twofold.core import ConfigError
from twofold.engine import runner
from twofold.engine.draft import DraftModel
from twofold.engine.request import Request, State
from twofold.engine.sampling import SamplingParams
from twofold.engine.speculation import Speculation

LLAMA = tiny.SPECS["llama"]
ASKED = [
    {"temperature": 0.0},
    {"temperature": 0.0, "repetition_penalty": 1.3, "logprobs": 4},
    {"temperature": 0.0, "frequency_penalty": 0.9, "presence_penalty": 0.4},
    {"temperature": 1.0, "top_p": 0.7, "logprobs": 2, "logprobs_mode": "processed"},
    {"temperature": 0.8, "top_k": 5, "logprobs": 0, "logprobs_mode": "tempered"},
    {"temperature": 1.5, "min_p": 0.05, "presence_penalty": 1.0},
    {"temperature": 0.9, "logit_bias": {3: 4.0, 9: -100.0}},
    {"temperature": 1.1, "allowed_token_ids": (1, 2, 3, 5, 7, 8, 11, 60)},
    {"temperature": 1.0, "ignore_eos": False, "min_tokens": 9, "logit_bias": {7: 6.0}},
    {"temperature": 1.0, "stop_token_ids": (4, 5), "logit_bias": {4: 3.0}},
]


def asked(number: int) -> Request:
    given = {"max_tokens": 24, "seed": number, "ignore_eos": True} | ASKED[number % len(ASKED)]
    return tiny.request(number, length=20 + number, **{"logprobs": None, **given})


def said_by(engine, count=10):
    return tiny.run(engine, *(asked(number) for number in range(count)))


@pytest.fixture(scope="module")
def llama():
    return tiny.decoder(LLAMA)


@pytest.mark.parametrize("compiled", [True, False])
def test_every_parameter_of_the_sampler_holds(llama, compiled, monkeypatch):
    if not compiled:
        monkeypatch.setattr(runner, "why_not", lambda decoder: "layers one by one")
    calm = said_by(tiny.engine(llama))
    engine = foretold(tiny.engine(llama), calm, tiny.VOCAB)
    assert (engine.runner.program is not None) is compiled
    said = said_by(engine)
    assert said == calm
    ends = {name: (output.finish, output.stop_reason) for name, output in calm.ends.items()}
    assert ends == {name: (output.finish, output.stop_reason) for name, output in said.ends.items()}
    assert {finish for finish, _ in ends.values()} == {State.STOP, State.LENGTH}
    assert engine.stats().acceptance > 0.4


@pytest.mark.parametrize("method", ["ngram", "suffix"])
@pytest.mark.parametrize("adaptive", [True, False])
def test_guesses_from_text_change_nothing(llama, method, adaptive):
    def requests():
        loops = [tiny.request(n, length=40, temperature=0.0, max_tokens=60, logprobs=1) for n in range(3)]
        return [*loops, *(asked(number) for number in range(10, 20))]

    calm = tiny.run(tiny.engine(llama), *requests())
    engine = tiny.engine(llama, speculative={"method": method, "adaptive": adaptive, "num_speculative_tokens": 7})
    for _ in range(2):
        assert tiny.run(engine, *requests()) == calm
    stats = engine.stats()
    assert stats.draft_tokens > 0 and stats.accepted_tokens == sum(stats.accepted_per_pos) > 0


def test_samples_of_one_prompt_stay_apart(llama):
    def sample(k):
        plain = tiny.request(9, length=70, max_tokens=30)
        return Request(id=f"s{k}", prompt_ids=plain.prompt_ids, params=plain.params, sample=k)

    calm = tiny.run(tiny.engine(llama), *(sample(k) for k in range(4)))
    engine = foretold(tiny.engine(llama), calm, tiny.VOCAB)
    assert tiny.run(engine, *(sample(k) for k in range(4))) == calm
    assert len({tuple(token.id for token in tokens) for tokens in calm.values()}) == 4


def test_a_resumed_request_goes_on_as_it_would_have(llama):
    for number in (2, 3):
        calm = tiny.run(tiny.engine(llama), tiny.request(number, max_tokens=20))
        whole = calm[f"r{number}"]
        resumed = tiny.request(number, max_tokens=20)
        resumed.output_ids.extend(token.id for token in whole[:7])
        assert tiny.run(foretold(tiny.engine(llama), calm, tiny.VOCAB), resumed)[f"r{number}"] == whole[7:]


def drafted(target, draft, *, wanted=4, adaptive=False, blocks=200, tokens=2048):
    engine = tiny.engine(target)
    model = DraftModel(draft, vocab=tiny.VOCAB, num_blocks=blocks, block_size=16, tokens=tokens, eos_ids=(7,))
    engine.speculation = engine.scheduler.speculation = Speculation(model, most=wanted, adaptive=adaptive)
    return engine, model


def test_a_draft_that_is_the_model_is_always_right_at_any_temperature(llama):
    """It draws with the same numbers, so equal distributions give equal tokens, penalties and bans included."""
    calm = said_by(tiny.engine(llama))
    engine, model = drafted(llama, llama)
    assert said_by(engine) == calm
    stats = engine.stats()
    assert stats.acceptance > 0.97, "all but those behind an end"
    assert stats.steps < 0.4 * 24 * 2
    assert model.pool.used == 0


@pytest.mark.parametrize(("blocks", "tokens", "adaptive"), [(200, 2048, True), (6, 2048, False), (200, 40, False)])
def test_a_smaller_draft_changes_nothing_with_little_room_either(llama, blocks, tokens, adaptive):
    calm = said_by(tiny.engine(llama), 20)
    draft = tiny.decoder(tiny.SPECS["gemma2"])
    engine, model = drafted(llama, draft, blocks=blocks, tokens=tokens, adaptive=adaptive)
    assert said_by(engine, 20) == calm
    assert engine.stats().draft_tokens > 0 and model.pool.used == 0
    model.pool.check_integrity([])


def test_sleep_and_new_weights_in_the_middle_change_no_text(llama):
    calm = said_by(tiny.engine(llama), 4)
    engine, model = drafted(llama, llama, wanted=2)
    heard = tiny.Said()
    for number in range(4):
        engine.submit(asked(number))
    for _ in range(3):
        heard.hear(engine.step())
    engine.sleep()
    assert model.pool.used == 0 and model.runner.cache is None
    engine.wake()
    heard.hear(engine.step())
    engine.load_weights(None, version=1)
    while engine.has_work:
        heard.hear(engine.step())
    assert heard == calm


def test_a_draft_of_another_vocabulary_is_refused(llama):
    with pytest.raises(ConfigError, match="same tokenizer"):
        DraftModel(llama, vocab=99, num_blocks=4, block_size=16, tokens=16, eos_ids=())


@pytest.mark.parametrize("compiled", [True, False])
def test_a_guess_whose_numbers_are_not_finite_harms_nobody(compiled, monkeypatch):
    """The embedding of one token is broken. No text has it, but guesses do."""
    if not compiled:
        monkeypatch.setattr(runner, "why_not", lambda decoder: "layers one by one")
    model = tiny.decoder(LLAMA)
    calm = said_by(tiny.engine(model))
    unused = next(t for t in range(tiny.VOCAB) if all(t != token.id for text in calm.values() for token in text))
    prompts = [asked(number).prompt_ids for number in range(len(ASKED))]
    good = [f"r{number}" for number, prompt in enumerate(prompts) if unused not in prompt]
    with torch.no_grad():
        model.get_parameter("embed.weight")[unused, 5] = math.nan
    engine = foretold(tiny.engine(model), calm, tiny.VOCAB, wrong=0.0)
    prophet = engine.speculation.proposer
    for text in prophet.texts.values():
        text[len(text) // 2] = unused
    requests = [asked(int(name[1:])) for name in good]
    said = tiny.run(engine, *requests)
    for name in good:
        assert [token.id for token in said[name]] == [token.id for token in calm[name]], name
        assert said.ends[name].error is None


def test_sampled_tokens_have_the_distribution_of_sampling(llama):
    """Chi-square of pairs of tokens, guessed at against other seeds without guesses; a colder one is told apart."""

    def pairs(engine, first, temperature):
        params = SamplingParams(temperature=temperature, top_k=5, max_tokens=3, ignore_eos=True)
        requests = [
            Request(id=f"r{seed}", prompt_ids=(5, 6, 7, 8), params=params.with_(seed=seed))
            for seed in range(first, first + 1500)
        ]
        said = tiny.run(engine, *requests)
        return said, Counter(tuple(token.id for token in text[1:]) for text in said.values())

    _, plain = pairs(tiny.engine(llama), 0, 1.0)
    usual, _ = pairs(tiny.engine(llama), 5000, 1.0)
    likeliest = Counter(tuple(t.id for t in text) for text in usual.values()).most_common(1)[0][0]
    engine = foretold(tiny.engine(llama), usual, tiny.VOCAB)
    engine.speculation.proposer.texts = dict.fromkeys(usual, likeliest)
    _, guessed = pairs(engine, 5000, 1.0)
    assert engine.stats().accepted_tokens > 200
    _, colder = pairs(tiny.engine(llama), 9000, 0.3)
    assert chi_square(plain, guessed) < 3.1, "standard deviations above what chance gives"
    assert chi_square(plain, colder) > 6.0


def chi_square(one: Counter, other: Counter) -> float:
    """How many standard deviations the statistic of two samples of one size lies above its mean (Wilson-Hilferty)."""
    keys = [key for key in one | other if one[key] + other[key] >= 10]
    rest = [sum(count for key, count in sample.items() if key not in keys) for sample in (one, other)]
    cells = [(one[key], other[key]) for key in keys] + ([tuple(rest)] if sum(rest) else [])
    statistic = sum((a - b) ** 2 / (a + b) for a, b in cells)
    free = len(cells) - 1
    return ((statistic / free) ** (1 / 3) - (1 - 2 / (9 * free))) / math.sqrt(2 / (9 * free))
