"""Many adapters in one batch: each request has the bits that its adapter alone has, in training and merged."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.parity import tiny
from tests.parity.test_lora_training import GPT2, LLAMA, MOE
from twofold.engine import runner
from twofold.engine.engine import Engine
from twofold.engine.request import Request, State
from twofold.kernels import native
from twofold.models import LoraConfig, PackedContext
from twofold.models.decoder import Decoder
from twofold.models.lora import adapt, merge, pair_parameters
from twofold.models.peft import load_adapter, save_adapter
from twofold.models.weights import spec_from

BASES = {
    "llama": (LLAMA, torch.float32),
    "llama-bf16": (LLAMA, torch.bfloat16),
    "llama-int8": (LLAMA, "int8"),
    "llama-int4-floats": (LLAMA, "int4-weight-only"),
    "gpt2": (GPT2, torch.float32),
    "moe": (MOE, torch.float32),
}
ADAPTERS = {
    "small": LoraConfig(rank=1, alpha=2.0),
    "middle": LoraConfig(rank=8, alpha=12.0, rslora=True),
    "large": LoraConfig(rank=33, alpha=20.0),
}
SOME = {
    "llama": ("q_proj", "v_proj", "down_proj"),
    "gpt2": ("attn.c_proj",),
    "moe": ("k_proj", "shared_expert.up_proj"),
}


def base_of(name: str) -> Decoder:
    config, format = BASES[name]
    if isinstance(format, str):
        return tiny.rounded(tiny.decoder(spec_from(config)), format)
    return tiny.decoder(spec_from(config), format)


def written(name: str, path: Path, config: LoraConfig, seed: int) -> Path:
    """The directory of an adapter that says something."""
    decoder = base_of(name)
    adapt(decoder, config, seed=seed)
    source = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, parameter in pair_parameters(decoder).items():
            if key.endswith(".b"):
                parameter.copy_(torch.randn(parameter.shape, generator=source) * 0.1)
    save_adapter(decoder, path)
    return path


@pytest.fixture(scope="module", params=BASES)
def base(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def paths(base: str, tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp(base)
    some = LoraConfig(rank=5, alpha=9.0, targets=SOME[base.partition("-")[0]])
    configs = ADAPTERS | {"some": some}
    return {name: written(base, folder / name, config, seed) for seed, (name, config) in enumerate(configs.items(), 1)}


def served(base: str, paths: dict[str, Path], **settings) -> Engine:
    engine = tiny.engine(base_of(base), enable_lora=True, **settings)
    for name, path in paths.items():
        engine.adapters.load(name, str(path))
    return engine


def asked(number: int, adapter: str, **what) -> Request:
    request = tiny.request(number, **what)
    request.adapter = adapter
    return request


WHO = ("small", "", "large", "some", "middle", "", "large", "small", "some")


def everybody(**what) -> list[Request]:
    return [asked(i, adapter, **what) for i, adapter in enumerate(WHO)]


def trained(base: str, path: Path | None) -> Engine:
    """An engine on the decoder that training has: one adapter, or none, beside the weights."""
    decoder = base_of(base)
    if path is not None:
        load_adapter(decoder, path)
    return tiny.engine(decoder)


# ------------------------------------------------------------------------------------------------ bits
def test_each_has_the_bits_of_its_adapter_alone_in_training(base, paths) -> None:
    engine = served(base, paths)
    assert native.missing() or engine.runner.program is not None
    together = tiny.run(engine, *everybody(prompt_logprobs=1))
    for name in ("", *paths):
        alone = trained(base, paths.get(name))
        for number in (i for i, who in enumerate(WHO) if who == name):
            said = tiny.run(alone, tiny.request(number, prompt_logprobs=1))
            assert said[f"r{number}"] == together[f"r{number}"], name
            assert said.prompts[f"r{number}"] == together.prompts[f"r{number}"], name
    assert len({together[f"r{i}"][0].logprob for i in range(len(WHO))}) == len(WHO)


def test_alone_in_chunks_found_and_preempted_are_as_together(base, paths) -> None:
    together = tiny.run(served(base, paths), *everybody())
    for number, adapter in ((0, "small"), (2, "large"), (1, "")):
        assert tiny.run(served(base, paths), asked(number, adapter))[f"r{number}"] == together[f"r{number}"]
        cut = served(base, paths, max_num_batched_tokens=7, max_num_seqs=1)
        assert tiny.run(cut, asked(number, adapter))[f"r{number}"] == together[f"r{number}"]
    longer = [asked(i, who, length=30, max_tokens=40) for i, who in enumerate(WHO[:5])]
    tight = served(base, paths, num_blocks=14)
    pressed = tiny.run(tight, *longer)
    assert tight.stats().preemptions > 0
    again = [asked(i, who, length=30, max_tokens=40) for i, who in enumerate(WHO[:5])]
    assert pressed == tiny.run(served(base, paths), *again)
    warm = served(base, paths)
    cold = tiny.run(warm, *(asked(i, who, length=70) for i, who in enumerate(WHO)))
    found = [asked(i, who, length=70) for i, who in enumerate(WHO)]
    assert tiny.run(warm, *found) == cold and all(request.num_cached == 64 for request in found)


def test_single_kernels_and_few_slots_have_the_same_bits(base, paths, monkeypatch) -> None:
    together = tiny.run(served(base, paths), *everybody())
    few = served(base, paths, max_loras=1, max_cpu_loras=2)
    assert tiny.run(few, *everybody()) == together
    monkeypatch.setattr(runner, "why_not", lambda decoder: "told so")
    single = served(base, paths)
    assert single.runner.program is None
    assert tiny.run(single, *everybody()) == together


def test_two_threads_have_the_bits_of_one(base, paths) -> None:
    before = torch.get_num_threads()
    said = []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            said.append(tiny.run(served(base, paths), *everybody()))
    finally:
        torch.set_num_threads(before)
    assert said[0] == said[1]


def test_guesses_change_nothing(base, paths) -> None:
    def requests() -> list[Request]:
        return [asked(i, who, temperature=0.0, max_tokens=40, logprobs=1) for i, who in enumerate(WHO)]

    calm = tiny.run(served(base, paths), *requests())
    guessing = served(base, paths, speculative={"method": "ngram", "adaptive": False, "num_speculative_tokens": 5})
    assert tiny.run(guessing, *requests()) == calm
    assert guessing.stats().draft_tokens > 0


# ------------------------------------------------------------------------------------------------ merged
def logits_of(decoder: Decoder, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return decoder.logits(decoder(ids, PackedContext([len(ids)])))


@pytest.mark.parametrize(
    "base", [name for name, (_, format) in BASES.items() if format == torch.float32], indirect=True
)
def test_logits_are_those_of_merged_weights(base, paths) -> None:
    ids = torch.arange(90) * 37 % tiny.VOCAB
    for path in paths.values():
        engine = served(base, {"it": path})
        merged = base_of(base)
        load_adapter(merged, path)
        merge(merged)
        slots = engine.slots
        assert slots is not None
        slots.put(0, slots.read(path, 1 << 30))
        with slots.step(engine.decoder, [90], [1]):
            found = logits_of(engine.decoder, ids)
        expected = logits_of(merged, ids)
        assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
        assert (found - logits_of(engine.decoder, ids)).abs().max() > 0.01, "it says something"


# ------------------------------------------------------------------------------------------------ what is kept apart
def test_other_weights_under_a_name_never_meet_its_cached_blocks(base, paths) -> None:
    def ask(on: Engine, number: int = 4) -> tuple[list, int]:
        request = asked(number, "it", length=70)
        return tiny.run(on, request)[f"r{number}"], request.num_cached

    engine = served(base, {"it": paths["small"]})
    first, _ = ask(engine)
    assert ask(engine) == (first, 64)
    engine.adapters.load("it", str(paths["large"]), replace=True)
    other, cached = ask(engine)
    assert cached == 0 and other != first
    assert other == ask(served(base, {"it": paths["large"]}))[0]
    engine.adapters.unload("it")
    engine.adapters.load("it", str(paths["small"]))
    assert ask(engine) == (first, 64), "the same numbers are the same adapter"


def test_who_runs_when_it_is_unloaded_goes_on(base, paths) -> None:
    expected = tiny.run(served(base, paths), *everybody())
    engine, said = served(base, paths), tiny.Said()
    for request in everybody():
        engine.submit(request)
    for _ in range(3):
        said.hear(engine.step())
    for name in paths:
        engine.adapters.unload(name)
    assert not engine.adapters.listed
    while engine.has_work:
        said.hear(engine.step())
    assert said == expected and engine.stats().adapter_bytes == 0
    assert all(output.finish is State.LENGTH for output in said.ends.values())


def test_new_weights_under_adapters(base, paths) -> None:
    engine = served(base, paths)
    before = tiny.run(engine, *everybody())
    with torch.no_grad():
        engine.decoder.norm.weight.mul_(1.5)
    engine.load_weights(None, 1)
    after = tiny.run(engine, *everybody())
    assert all(after[name] != before[name] for name in before)
    fresh = served(base, paths)
    with torch.no_grad():
        fresh.decoder.norm.weight.mul_(1.5)
    assert tiny.run(fresh, *everybody()) == after
