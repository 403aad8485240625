"""Layers that pass through two buffers have the bits of layers that stay; a disk that fails is the requests' affair."""

from __future__ import annotations

import gc
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.parity import tiny
from twofold.core import CapacityError, CheckpointError, ConfigError
from twofold.engine.capacity import forecast
from twofold.engine.config import EngineConfig
from twofold.engine.identity import identity
from twofold.engine.opening import budgeted
from twofold.engine.opening import streamed as streamed_parts
from twofold.engine.request import Request, State
from twofold.engine.sampling import SamplingParams
from twofold.models import Decoder, load, save, spec_from
from twofold.models.packed import PackedContext
from twofold.models.sections import sections
from twofold.models.streamed import bare, load_streamed
from twofold.models.streaming import Readers, held_bytes, kept_layers, least_bytes
from twofold.platforms.direct import PAGE, Direct, cached, room

LAYERS = 5
LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": tiny.VOCAB,
    "hidden_size": 40,
    "intermediate_size": 52,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}
MOE = LLAMA | {
    "architectures": ["Qwen3MoeForCausalLM"],
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "head_dim": 10,
    "mlp_only_layers": [1],
    "tie_word_embeddings": True,
}
GPT2: dict[str, Any] = {
    "architectures": ["GPT2LMHeadModel"],
    "n_embd": 40,
    "n_layer": LAYERS,
    "n_head": 4,
    "n_positions": 256,
    "vocab_size": tiny.VOCAB,
}


def checkpoint(folder: Path, config: dict[str, Any] = LLAMA, dtype: torch.dtype = torch.float32) -> Path:
    decoder = tiny.decoder(spec_from(config))
    save(decoder, folder, config=config, dtype=dtype)
    return folder


def streamed(folder: Path, directory: Path, *, spare: int = 0, **how: Any) -> Decoder:
    """With two buffers and `spare` more layers in memory."""
    how = {"dtype": torch.float32, "max_len": None, "quantization": None} | how
    found = sections(bare(folder, **how))
    budget = least_bytes(found) + spare * max(section.nbytes for section in found[1:])
    return load_streamed(folder, budget=budget, directory=directory, **how)


def requests() -> list[Request]:
    params = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True, logprobs=3)
    return [Request(id=f"{n}", prompt_ids=tuple(range(n, n + 20 + 7 * n)), params=params) for n in range(3)]


def answers(decoder: Decoder) -> Any:
    return tiny.run(tiny.engine(decoder), *requests())


@pytest.mark.parametrize("config", [LLAMA, MOE, GPT2], ids=["llama", "moe", "gpt2"])
@pytest.mark.parametrize(
    ("dtype", "quantization"),
    [(torch.float32, None), (torch.bfloat16, None), (torch.float32, "int8"), (torch.bfloat16, "int4")],
    ids=["fp32", "bf16", "int8", "int4"],
)
def test_streamed_and_resident_have_one_set_of_bits(
    config: dict[str, Any], dtype: torch.dtype, quantization: str | None, tmp_path: Path
) -> None:
    folder = checkpoint(tmp_path / "model", config)
    resident = load(folder, dtype=dtype, quantization=quantization)
    passing = streamed(folder, tmp_path / "offload", dtype=dtype, quantization=quantization)
    assert passing.stream is not None and not passing.stream.kept
    ids_T = torch.arange(50)
    with torch.inference_mode():
        hidden = [decoder(ids_T, PackedContext([20, 30])) for decoder in (resident, passing)]  # layer by layer
    assert torch.equal(*hidden)
    assert answers(passing) == answers(resident)  # compiled, where it can be
    assert passing.stream.readers.read_bytes > 0


def test_some_layers_stay_and_the_file_is_made_once(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "model")
    want = answers(load(folder))
    made = []
    for spare in (0, 1, 2, LAYERS):
        decoder = streamed(folder, tmp_path / "offload", spare=spare)
        assert decoder.stream is not None
        assert len(decoder.stream.kept) == (spare if spare < LAYERS - 2 else LAYERS)
        assert answers(decoder) == want
        (file,) = (tmp_path / "offload").iterdir()
        made.append((file.name, file.stat().st_mtime_ns, file.stat().st_ino))
    assert len(set(made)) == 1
    assert file.stat().st_mode & 0o77 == 0
    checkpoint(folder, LLAMA | {"rope_theta": 5e3})  # another checkpoint in the same place: the file is made anew
    assert answers(streamed(folder, tmp_path / "offload")) == answers(load(folder))
    assert [p.name for p in (tmp_path / "offload").iterdir()] == [file.name]
    assert file.stat().st_ino != made[0][2]


def test_the_weights_are_known_by_all_their_bytes(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "model", MOE)
    want = identity(load(folder, dtype=torch.bfloat16, quantization="int8"), "a cache")
    decoder = streamed(folder, tmp_path / "offload", spare=1, dtype=torch.bfloat16, quantization="int8")
    assert [identity(decoder, "a cache") for _ in range(2)] == [want] * 2


def test_memory_is_what_was_said(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "model", MOE)
    found = sections(bare(folder, torch.float32, None, None))
    for spare in (0, 1):
        decoder = streamed(folder, tmp_path / "offload", spare=spare)
        budget = least_bytes(found) + spare * max(section.nbytes for section in found[1:])
        storages = {
            tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
            for tensor in (*decoder.parameters(), *decoder.buffers())
        }
        assert sum(storages.values()) == held_bytes(found, budget) <= found[0].nbytes + budget
    assert kept_layers(found, sum(section.nbytes for section in found[1:])) == frozenset(range(LAYERS))
    with pytest.raises(CapacityError, match="2 layers at once need"):
        kept_layers(found, least_bytes(found) - 1)


def test_as_many_layers_stay_as_memory_allows() -> None:
    spec = spec_from(LLAMA | {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 16})
    config = EngineConfig(weights="stream", dtype="float32", kv_dtype="float32", max_num_seqs=4, max_model_len=256)
    found, seen = sections(Decoder(spec, device="meta")), []
    for mib in (600, 900, 1200, 4096):
        told = budgeted(spec, config, mib << 20, {})
        sums = forecast(spec, told, mib << 20)
        assert sums.fits and sums.weights == held_bytes(found, told.weights_memory_bytes or 0)
        seen.append(streamed_parts(spec, told, {}))
    stay, read = zip(*seen)
    assert stay[0] == 0 and read[0] == sum(section.nbytes for section in found[1:])
    assert list(stay) == sorted(stay) and 0 < stay[1] < stay[2] < stay[3] == 16 and read[3] == 0
    tight = EngineConfig(dtype="float32", kv_dtype="float32", quantization="int4", max_num_seqs=4, max_model_len=64)
    assert "--weights stream" in forecast(spec, tight, 400 << 20).fix


def test_what_is_cut_short_is_refused_at_the_start(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "model")
    streamed(folder, tmp_path / "offload")
    (file,) = (tmp_path / "offload").iterdir()
    os.truncate(file, file.stat().st_size - PAGE)
    with pytest.raises(CheckpointError, match="remove it, and it is made anew"):
        streamed(folder, tmp_path / "offload")
    file.unlink()
    streamed(folder, tmp_path / "offload")
    whole = folder / "model.safetensors"
    os.truncate(whole, whole.stat().st_size - 100)
    with pytest.raises(CheckpointError, match="is damaged"):
        streamed(folder, tmp_path / "offload")
    assert [p.name for p in (tmp_path / "offload").iterdir()] == [file.name]  # nothing half made is left


def test_a_disk_that_fails_ends_the_requests_and_not_the_engine(tmp_path: Path, monkeypatch) -> None:
    folder = checkpoint(tmp_path / "model")
    decoder = streamed(folder, tmp_path / "offload")
    want = answers(load(folder))
    engine = tiny.engine(decoder)
    assert tiny.run(engine, *requests()) == want
    read, bad = Direct.read, threading.Event()
    at = sections(bare(folder, torch.float32, None, None))[4].begin

    def fails(self: Direct, begin: int, room: memoryview) -> None:
        if bad.is_set() and begin == at:
            raise OSError(5, os.strerror(5))
        read(self, begin, room)

    monkeypatch.setattr(Direct, "read", fails)
    bad.set()
    failing = requests()
    for request in failing:
        engine.submit(request)
    outputs = []
    while engine.has_work:
        outputs += engine.step()
    last = [output for output in outputs if output.finish]
    assert [output.finish for output in last] == [State.ERROR] * len(failing)
    assert all("layer 3 of the weights could not be read" in str(output.error) for output in last)
    bad.clear()
    again = [Request(id=f"{n}!", prompt_ids=r.prompt_ids, params=r.params) for n, r in enumerate(requests())]
    assert list(tiny.run(engine, *again).values()) == list(want.values())


def test_weights_in_a_file_are_not_replaced(tmp_path: Path) -> None:
    engine = tiny.engine(streamed(checkpoint(tmp_path / "model"), tmp_path / "offload"))
    with pytest.raises(ConfigError, match="cannot be replaced"):
        engine.load_weights([], version=1)


def test_the_readers_leave_with_the_decoder(tmp_path: Path) -> None:
    decoder = streamed(checkpoint(tmp_path / "model"), tmp_path / "offload")

    def readers() -> int:
        return sum(thread.name.startswith("weights-") for thread in threading.enumerate())

    assert readers()
    before = readers()
    del decoder
    gc.collect()
    due = time.monotonic() + 5
    while readers() >= before and time.monotonic() < due:
        time.sleep(0.01)
    assert readers() < before


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("buffers", [1, 2, 3])
def test_each_turn_finds_its_own_bytes_in_any_order(count: int, buffers: int, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("twofold.models.streaming.PIECE", PAGE)
    file = tmp_path / "turns"
    file.write_bytes(b"".join(bytes([turn]) * PAGE * 3 for turn in range(count)))
    from twofold.models.sections import Section

    rooms = [room(3 * PAGE) for _ in range(min(buffers, count))]
    readers = Readers(Direct(file), [Section(turn * 3 * PAGE, 3 * PAGE, ()) for turn in range(count)], rooms)
    orders = [*range(count)] * 5 + [0, *range(count), count - 1, *reversed(range(count))]
    for turn in orders:
        readers.take(turn)
        assert bytes(rooms[turn % len(rooms)].numpy()) == bytes([turn]) * PAGE * 3
        readers.give_back()
    readers.stop()


def test_what_is_read_past_the_cache_is_not_in_it(tmp_path: Path) -> None:
    decoder = streamed(checkpoint(tmp_path / "model"), tmp_path / "offload")
    assert decoder.stream is not None
    answers(decoder)
    assert decoder.stream.readers.read_bytes > decoder.stream.file.size
    if decoder.stream.file.past_cache:
        assert cached(decoder.stream.file.path) <= decoder.stream.file.size // 4
