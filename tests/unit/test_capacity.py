"""The sum of bytes: exact for weights, a true bound for a step, and a refusal that names what would fit."""

import re
from dataclasses import replace

import pytest
import torch

from twofold.core import CapacityError
from twofold.engine.capacity import RUNTIME, forecast, weight_bytes
from twofold.engine.config import EngineConfig
from twofold.engine.paged import KVCache
from twofold.engine.plan import Chunk, Draw, StepPlan
from twofold.engine.runner import Runner
from twofold.engine.sampling import SamplingParams
from twofold.models.adapters import Slots
from twofold.models.decoder import Decoder
from twofold.models.spec import (
    Attention,
    Embedding,
    Gated,
    Head,
    LayerSpec,
    Learned,
    Mixture,
    ModelSpec,
    Names,
    Norm,
    Plain,
    Pre,
    Rope,
)
from twofold.models.weights import spec_from

MIB = 2**20
RMS = Norm(kind="rms", eps=1e-6)
FFNS = {
    "gated": Gated(width=600, act="silu"),
    "plain": Plain(width=900, act="gelu", bias=True),
    "mixture": Mixture(experts=4, top_k=2, width=300, act="silu", shared_width=128),
}


def make_spec(
    ffn: str = "gated", *, vocab: int = 500, heads: int = 4, max_len: int = 1024, **more: object
) -> ModelSpec:
    mixer = Attention(heads=heads, kv_heads=2, head_dim=16, position=Rope(theta=1e4, dim=16))
    layer = LayerSpec(mixer=mixer, ffn=FFNS[ffn], norms=Pre(norm=RMS))
    return ModelSpec(
        architecture="Test",
        hidden=64,
        vocab=vocab,
        layers=(layer, layer),
        norm=RMS,
        names=Names(table={}),
        max_len=max_len,
        embedding=Embedding(positions=Learned(size=max_len, offset=2)),
        head=Head(tied=False, bias=True),
    )


@pytest.mark.parametrize("ffn", FFNS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_counted_exactly(ffn: str, dtype: torch.dtype) -> None:
    spec = make_spec(ffn)
    real = Decoder(spec, dtype=dtype)
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in real.parameters()}
    assert weight_bytes(spec, dtype) == sum(storages.values())


def test_cache_is_counted_exactly() -> None:
    spec, settings = make_spec(), EngineConfig(num_blocks=37)
    found = forecast(spec, settings, 2**34)
    assert found.kv_bytes == KVCache(spec, found.blocks, settings.block_size).nbytes


@pytest.mark.parametrize(("count", "requests"), [(256, 1), (16, 16), (1, 32)])
@pytest.mark.parametrize("window", [None, 900])
@pytest.mark.parametrize(("ffn", "vocab", "heads"), [("gated", 500, 16), ("mixture", 500, 4), ("plain", 20_000, 4)])
def test_a_step_stays_below_its_bound(
    ffn: str, vocab: int, heads: int, window: int | None, count: int, requests: int
) -> None:
    """Peak of torch's own allocator over a runner's life, against the bound: never above, not idly far below."""
    spec = make_spec(ffn, vocab=vocab, heads=heads, window=window)
    settings = EngineConfig(max_num_batched_tokens=count * requests, max_num_seqs=requests, num_blocks=64)
    measured = peak_of_step(spec, settings, 1024 - count, count)
    bound = forecast(spec, settings, 2**40).activations
    assert measured <= bound <= 8 * measured


def test_adapters_and_their_step_are_counted() -> None:
    named = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 500, "hidden_size": 128}
    heads = {"num_hidden_layers": 2, "num_attention_heads": 16, "intermediate_size": 300}
    spec = spec_from(named | heads | {"max_position_embeddings": 2048, "rms_norm_eps": 1e-5})
    settings = EngineConfig(max_num_batched_tokens=256, max_num_seqs=1, num_blocks=64, enable_lora=True)
    found, plain = (
        forecast(spec, each, 2**40).activations for each in (settings, replace(settings, enable_lora=False))
    )
    measured = peak_of_step(spec, settings, 768, 256)
    assert plain < measured <= found - settings.lora_cache_bytes <= 8 * measured


def peak_of_step(spec: ModelSpec, settings: EngineConfig, start: int, count: int) -> int:
    """Bytes that torch held at once, beyond what it held before, in making a runner and one forward with sampling.

    The cache's memory comes straight from the system, so it is not in the sum.
    """
    decoder = Decoder(spec)
    for parameter in decoder.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    lora = settings.enable_lora
    draw = Draw(params=SamplingParams(temperature=0.8, top_k=5), seed=1, sample=0, position=start + count)
    chunks = [
        Chunk(serial=i, start=start, ids=(0,) * count, blocks=tuple(range(64)), draws=(draw,), adapter=int(lora))
        for i in range(settings.max_num_seqs)
    ]

    def step() -> None:
        slots = Slots(decoder, settings.max_loras, settings.max_lora_rank) if lora else None
        tokens = settings.max_num_batched_tokens
        runner = Runner(decoder, num_blocks=64, block_size=16, tokens=tokens, slots=slots)
        runner.execute(StepPlan(step=0, chunks=tuple(chunks)))

    step()  # row counts are measured at a shape's first use
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as seen:
        step()
    results = seen.profiler.kineto_results  # type: ignore[union-attr]
    moves = sorted((event.start_ns(), event.nbytes()) for event in results.events() if event.name() == "[memory]")
    live = most = 0
    for _, change in moves:
        live += change
        most = max(most, live)
    return most


def test_what_is_wanted_is_given_and_not_more() -> None:
    spec, settings = make_spec(), EngineConfig(max_num_seqs=3)
    found = forecast(spec, settings, 2**40)
    assert found.fits
    assert found.blocks * found.block_size == 3 * 1024
    assert (found.context, found.concurrency) == (1024, 3)


def test_the_cache_takes_at_most_half_of_what_is_left() -> None:
    spec, settings = make_spec(), EngineConfig()
    empty = forecast(spec, settings, 2**40)
    fixed = empty.runtime + empty.weights + empty.activations
    memory = fixed + 20 * MIB
    found = forecast(spec, settings, memory)
    assert 0 < found.kv_bytes <= 10 * MIB < found.kv_bytes + found.block_size * found.kv_per_token


def test_loaded_weights_are_not_counted_again() -> None:
    spec, settings = make_spec(), EngineConfig()
    before, after = forecast(spec, settings, 2**34), forecast(spec, settings, 2**34, loaded=True)
    assert before.runtime == RUNTIME
    assert after.runtime == after.weights == 0
    assert after.activations == before.activations


def flags_to_settings(message: str, settings: EngineConfig) -> EngineConfig:
    """The settings that a refusal advises."""
    changes: dict[str, object] = {}
    for name, value in re.findall(r"--([a-z-]+) (\d+|bfloat16)", message):
        changes[name.replace("-", "_")] = int(value) if value.isdigit() else value
    assert changes, message
    return replace(settings, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("squeeze", [0.999, 0.9, 0.5, 0.3])
@pytest.mark.parametrize("max_len", [1024, 16_384])
def test_a_refusal_names_a_setting_that_then_fits(squeeze: float, max_len: int) -> None:
    spec = make_spec(max_len=max_len, vocab=4000)
    settings = EngineConfig(max_num_batched_tokens=256, max_num_seqs=8)
    room = forecast(spec, settings, 2**40)
    fixed = room.runtime + room.weights
    least = room.activations + room.wanted * room.kv_per_token
    tight = fixed + int(least * squeeze)
    found = forecast(spec, settings, tight)
    assert not found.fits
    with pytest.raises(CapacityError) as refusal:
        found.require()
    advised = flags_to_settings(str(refusal.value), settings)
    assert advised != settings
    then = forecast(spec, advised, tight).require()
    assert then.total <= tight


def test_too_much_cache_is_refused_before_it_is_taken() -> None:
    spec = make_spec()
    found = forecast(spec, EngineConfig(kv_cache_memory_bytes=2**40), 2**32)
    with pytest.raises(CapacityError, match="leave out --num-blocks and --kv-cache-memory-bytes"):
        found.require()
    assert forecast(spec, EngineConfig(), 2**32).fits


def test_half_the_weights_may_be_the_fix() -> None:
    spec = make_spec(vocab=2_000_000)
    settings = EngineConfig(max_num_batched_tokens=16, max_num_seqs=1)
    room = forecast(spec, settings, 2**40)
    with pytest.raises(CapacityError) as refusal:
        forecast(spec, settings, room.runtime + int(room.weights * 0.8)).require()
    assert "--dtype bfloat16" in str(refusal.value)


def test_hopeless_is_said_to_be_hopeless() -> None:
    with pytest.raises(CapacityError, match=r"free [\d,]+ MiB more or choose a smaller model"):
        forecast(make_spec(), EngineConfig(), 10 * MIB).require()
