"""A prefix computed, found in the pool, in host memory or on a disk by another engine: the same bits, or not found."""

import pytest
import torch

from tests.parity import tiny
from twofold.engine.contents import BlockContents
from twofold.engine.identity import identity
from twofold.engine.request import State
from twofold.kernels import native

KEPT = {"fp32": "float32", "bf16": "bfloat16", "int8": "int8", "fp8": "fp8"}
LENGTH = 150


@pytest.fixture(scope="module")
def model():
    return tiny.decoder(tiny.SPECS["gemma2"])


def said_by(engine, number=5, **how):
    request = tiny.request(number, length=LENGTH, prompt_logprobs=None, **how)
    said = tiny.run(engine, request)
    return said, request.num_cached


def disk(engine):
    return engine.stats().tiers["disk"]


@pytest.mark.parametrize("kept", KEPT)
def test_wherever_a_prefix_is_found_the_bits_are_those_of_computing_it(model, kept, tmp_path):
    if kept in ("int8", "fp8") and native.missing():
        pytest.skip(f"an {kept} cache needs the CPU kernels: {native.missing()}")
    settings = {"kv_dtype": KEPT[kept], "num_blocks": 16}
    cold, _ = said_by(tiny.engine(model, **settings))
    first = tiny.engine(model, **settings, kv_host_bytes=4 << 20, kv_offload_dir=str(tmp_path))
    assert said_by(first) == (cold, 0)
    assert said_by(first) == (cold, 144), "in the pool"
    assert first.stats().external_hits == 0
    for other in (1, 2):
        said_by(first, other)
    assert said_by(first) == (cold, 144), "in host memory"
    stats = first.stats()
    assert stats.tiers["host"]["hits"] == 144 == stats.external_hits and disk(first)["hits"] == 0
    first.close()
    second = tiny.engine(model, **settings, kv_offload_dir=str(tmp_path))
    assert said_by(second) == (cold, 144), "on the disk, by another engine"
    assert disk(second)["hits"] == 144 and disk(second)["errors"] == 0
    second.close()


def test_other_weights_formats_and_sizes_find_nothing(model, tmp_path):
    said_by(first := tiny.engine(model, kv_offload_dir=str(tmp_path)))
    first.close()
    other = tiny.decoder(tiny.SPECS["gemma2"])
    with torch.no_grad():
        next(other.parameters())[0, 0] += 2**-10
    for decoder, settings in ((other, {}), (model, {"kv_dtype": "bfloat16"}), (model, {"block_size": 32})):
        engine = tiny.engine(decoder, kv_offload_dir=str(tmp_path), **settings)
        assert said_by(engine)[1] == 0 and disk(engine)["hits"] == 0
        engine.close()
    same = tiny.engine(tiny.decoder(tiny.SPECS["gemma2"]), kv_offload_dir=str(tmp_path))
    assert said_by(same)[1] == 144, "a copy of the weights is the same model"
    same.close()


def test_new_weights_in_the_engine_neither_find_nor_leave_blocks(model, tmp_path):
    engine = tiny.engine(model, kv_offload_dir=str(tmp_path), kv_host_bytes=4 << 20)
    said_by(engine)
    engine.load_weights(None, version=1)
    assert said_by(engine)[1] == 0
    said_by(engine, 6)
    engine.close()
    assert len(list(tmp_path.rglob("*.kv"))) == (LENGTH + 11) // 16, "those of the checkpoint's own weights"


def test_torn_files_change_no_text(model, tmp_path):
    said_by(first := tiny.engine(model, kv_offload_dir=str(tmp_path)))
    first.close()
    files = sorted(tmp_path.rglob("*.kv"))
    for number, path in enumerate(files):
        raw = bytearray(path.read_bytes())
        raw[-1 - number * 97 % len(raw)] ^= 4
        path.write_bytes(raw[: len(raw) - number % 2])
    cold, _ = said_by(tiny.engine(model))
    second = tiny.engine(model, kv_offload_dir=str(tmp_path))
    assert said_by(second) == (cold, 0) and disk(second)["errors"] >= 1
    second.close()


def test_preempted_is_as_undisturbed(model):
    requests = range(40, 46)
    calm = tiny.run(tiny.engine(model), *(tiny.request(i, length=30, max_tokens=40) for i in requests))
    tight = tiny.engine(model, num_blocks=14, kv_host_bytes=4 << 20)
    pressed = tiny.run(tight, *(tiny.request(i, length=30, max_tokens=40) for i in requests))
    stats = tight.stats()
    assert pressed == calm and stats.preemptions > 0 and stats.tiers["host"]["hits"] > 0
    assert {output.finish for output in pressed.ends.values()} == {State.LENGTH}


def test_sleep_keeps_what_the_tiers_have(model):
    engine = tiny.engine(model, num_blocks=16, kv_host_bytes=4 << 20)
    cold, _ = said_by(engine)
    for other in (1, 2):
        said_by(engine, other)
    engine.sleep()
    engine.wake()
    assert said_by(engine) == (cold, 144)


def test_the_identity_is_that_of_content(model):
    engine = tiny.engine(model)
    about = BlockContents(lambda: engine.runner.layers).about
    same = tiny.decoder(tiny.SPECS["gemma2"])
    assert identity(model, about) == identity(same, about) != identity(model, about + ".")
    list(same.parameters())[-1].data.view(-1)[-1] += 1.0
    assert identity(model, about) != identity(same, about)
