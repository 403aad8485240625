"""The numerics contract, by bits and never by tolerance: one plan, one platform, one log-probability.

Every TokenOut is compared with all it holds: id, exact log-probability, rank, alternatives.
"""

from __future__ import annotations

import random

import pytest
import torch

from tests.parity import tiny
from tests.parity.prophet import foretold
from twofold.engine.request import Request, State
from twofold.kernels import native
from twofold.models.packed import PackedContext

# What is served: a decoder's spec, what its weights are kept in, and its keys and values.
MODELS = {name: (spec, torch.float32, "auto") for name, spec in tiny.SPECS.items()} | {
    "llama-bf16": (tiny.SPECS["llama"], torch.bfloat16, "auto"),
    "llama-int8": (tiny.SPECS["llama"], "int8", "bfloat16"),
    "gemma2-int4": (tiny.SPECS["gemma2"], "int4", "auto"),
    "moe-int4": (tiny.SPECS["moe"], "int4-g64", "auto"),
    "alibi-int8-group": (tiny.SPECS["alibi"], "int8-g32-asym", "auto"),
    "llama-int4-floats": (tiny.SPECS["llama"], "int4-weight-only", "auto"),
    "sparse-int8": (tiny.SPECS["sparse"], "int8", "bfloat16"),
    "llama-kv-int8": (tiny.SPECS["llama"], torch.bfloat16, "int8"),
    "llama-fp8-kv-fp8": (tiny.SPECS["llama"], "fp8", "fp8"),
    "gemma2-kv-fp8": (tiny.SPECS["gemma2"], torch.float32, "fp8"),
    "gemma2-int4-kv-int8": (tiny.SPECS["gemma2"], "int4", "int8"),
}
KEPT = {"auto": None, "bfloat16": torch.bfloat16, "int8": torch.int8, "fp8": torch.float8_e4m3fn}


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    spec, format, kv_dtype = MODELS[request.param]
    if kv_dtype in ("int8", "fp8") and native.missing():
        pytest.skip(f"an {kv_dtype} cache needs the CPU kernels: {native.missing()}")
    if isinstance(format, str):
        made = tiny.rounded(tiny.decoder(spec), format)
    else:
        made = tiny.decoder(spec, format)
    made.kv_dtype = kv_dtype
    return made


def engine_of(model, **settings):
    return tiny.engine(model, kv_dtype=model.kv_dtype, **settings)


def test_alone_is_as_among_31_others(model):
    together = tiny.run(engine_of(model), *(tiny.request(i, prompt_logprobs=1) for i in range(32)))
    assert len({tuple(t.id for t in tokens) for tokens in together.values()}) > 20, "the texts differ from each other"
    for number in (0, 1, 2, 3, 17, 30):
        alone = tiny.run(engine_of(model), tiny.request(number, prompt_logprobs=1))
        assert alone[f"r{number}"] == together[f"r{number}"]
        assert alone.prompts[f"r{number}"] == together.prompts[f"r{number}"]


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_a_prompt_in_chunks_is_as_the_whole_prompt(model, chunk):
    for number in (1, 3):
        whole = tiny.run(engine_of(model), tiny.request(number, length=150, prompt_logprobs=2))
        cut = engine_of(model, max_num_batched_tokens=chunk, max_num_seqs=1)
        parts = tiny.run(cut, tiny.request(number, length=150, prompt_logprobs=2))
        assert parts == whole and parts.prompts == whole.prompts
        assert cut.stats().steps >= 150 // chunk


@pytest.mark.parametrize("length", [33, 48, 150])
def test_a_prefix_found_is_as_one_computed(model, length):
    warm = engine_of(model)
    cold = [tiny.run(warm, tiny.request(n, length=length)) for n in (5, 6)]
    for number, first in zip((5, 6), cold):
        again = tiny.request(number, length=length)
        assert tiny.run(warm, again) == first
        assert again.num_cached == (length - 1) // 16 * 16 > 0


def test_samples_that_share_their_prompt_are_as_apart(model):
    def sample(k):
        plain = tiny.request(9, length=70)
        return Request(id=f"s{k}", prompt_ids=plain.prompt_ids, params=plain.params, sample=k)

    shared = engine_of(model)
    together = tiny.run(shared, *(sample(k) for k in range(4)))
    assert shared.stats().computed_tokens < 70 + 4 * 12 + 3 * 16
    assert len({tuple(t.id for t in tokens) for tokens in together.values()}) == 4
    for k in range(4):
        assert tiny.run(engine_of(model, enable_prefix_caching=False), sample(k))[f"s{k}"] == together[f"s{k}"]


@pytest.mark.parametrize("caching", [True, False])
def test_preempted_is_as_undisturbed(model, caching):
    requests = range(40, 46)
    calm = tiny.run(engine_of(model), *(tiny.request(i, length=30, max_tokens=40) for i in requests))
    tight = engine_of(model, num_blocks=14, enable_prefix_caching=caching)
    pressed = tiny.run(tight, *(tiny.request(i, length=30, max_tokens=40) for i in requests))
    assert tight.stats().preemptions > 0
    assert pressed == calm


def test_the_trainers_forward_is_the_engines(model):
    """Packed training batches give the log-probabilities that the engine gave while it generated."""
    said = tiny.run(engine_of(model), *(tiny.request(i, prompt_logprobs=0, logprobs_mode="raw") for i in range(12)))
    sequences = {f"r{i}": [*tiny.request(i).prompt_ids, *(t.id for t in said[f"r{i}"])] for i in range(12)}
    lengths = [len(ids) for ids in sequences.values()]
    ids_T = torch.tensor([token for ids in sequences.values() for token in ids])
    model.train()
    hidden_TD = model(ids_T, PackedContext(lengths, kv_dtype=KEPT[model.kv_dtype] or model.dtype))
    assert hidden_TD.requires_grad, "the training path, not the serving one"
    trained_T = model.logprobs(hidden_TD[:-1], ids_T[1:], keep=True)  # across a border nothing is meant
    trained_T = torch.cat([trained_T, trained_T.new_zeros(1)])
    for (name, _), rows in zip(sequences.items(), trained_T.split(lengths)):
        trained = rows[:-1].tolist()
        served = [token.logprob for token in (*said.prompts[name][1:], *said[name])]
        assert trained == served, name


def test_resumed_after_a_crash_is_as_undisturbed(model):
    for number in (2, 3):
        whole = tiny.run(engine_of(model), tiny.request(number))[f"r{number}"]
        resumed = tiny.request(number)
        resumed.output_ids.extend(token.id for token in whole[:5])
        assert tiny.run(engine_of(model), resumed)[f"r{number}"] == whole[5:]


@pytest.mark.skipif(bool(native.missing()), reason="the references' bits may depend on the number of threads")
def test_one_thread_is_as_two_and_four(model):
    before = torch.get_num_threads()
    said = []
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            said.append(tiny.run(engine_of(model), *(tiny.request(i, prompt_logprobs=0) for i in range(6))))
    finally:
        torch.set_num_threads(before)
    assert said[0] == said[1] == said[2]
    assert said[0].prompts == said[1].prompts == said[2].prompts


def test_random_aborts_change_nobody_elses_text(model):
    calm = tiny.run(engine_of(model), *(tiny.request(i) for i in range(32)))
    rng, engine, said = random.Random(2), engine_of(model, num_blocks=90), tiny.Said()
    for i in range(32):
        engine.submit(tiny.request(i))
    while engine.has_work:
        said.hear(engine.step())
        if rng.random() < 0.5:
            engine.abort(f"r{rng.randrange(32)}")
        engine.scheduler.check_integrity()
    ends = [output.finish for output in said.ends.values()]
    assert len(ends) == 32 and ends.count(State.ABORT) > 3 and ends.count(State.LENGTH) > 3
    for name, tokens in calm.items():
        assert said[name] == tokens[: len(said[name])]
        assert said.ends[name].finish is State.ABORT or said[name] == tokens
    assert engine.stats().blocks_used == 0


def test_sleep_and_new_weights_in_the_middle_change_no_text(model):
    calm = tiny.run(engine_of(model), *(tiny.request(i) for i in range(4)))
    shaken, said = engine_of(model), tiny.Said()
    for i in range(4):
        shaken.submit(tiny.request(i))
    for _ in range(3):
        said.hear(shaken.step())
    shaken.sleep()
    shaken.wake()
    said.hear(shaken.step())
    shaken.load_weights(None, version=1)
    while shaken.has_work:
        said.hear(shaken.step())
    assert said == calm
    assert {output.finish for output in said.ends.values()} == {State.LENGTH}


def test_drafted_is_as_single(model):
    """Several tokens a step, right and wrong: alone, together, in chunks, pressed for blocks, found in the cache."""

    def requests():
        short = [tiny.request(i, prompt_logprobs=1, max_tokens=20) for i in range(6)]
        return [*short, *(tiny.request(i, length=30, max_tokens=40, min_tokens=5) for i in range(40, 44))]

    calm = tiny.run(engine_of(model), *requests())
    for settings in ({}, {"num_blocks": 16, "max_num_seqs": 5}, {"max_num_batched_tokens": 24, "max_num_seqs": 8}):
        engine = foretold(engine_of(model, **settings), calm, tiny.VOCAB)
        for turn in range(2):
            said = tiny.run(engine, *requests())
            assert said == calm and said.prompts == calm.prompts, (settings, turn)
        stats = engine.stats()
        assert stats.accepted_tokens > 60 and stats.draft_tokens > stats.accepted_tokens + 20
        assert (stats.preemptions > 0) is ("num_blocks" in settings)
    for number in (1, 2, 3):
        alone = tiny.run(foretold(engine_of(model), calm, tiny.VOCAB), tiny.request(number, max_tokens=20))
        assert alone[f"r{number}"] == calm[f"r{number}"]
