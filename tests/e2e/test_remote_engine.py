"""An engine in a process of its own: the same bits, weights that change between steps or not at all, and its death."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time

import pytest
import torch

from tests.parity import tiny
from tests.parity.bare_words import BareWords, prompt
from twofold.align import remote as remotes
from twofold.align.buckets import Buckets
from twofold.align.remote import RemoteEngine
from twofold.align.remote_config import RemoteConfig
from twofold.align.rollout import rollout
from twofold.core import CheckpointError, ConfigError, RequestError, StateError, WorkerError
from twofold.engine.config import EngineConfig
from twofold.engine.engine import Engine
from twofold.engine.request import State
from twofold.engine.sampling import SamplingParams
from twofold.models.weights import decoder_tensors, spec_from

MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": tiny.VOCAB,
    "hidden_size": 40,
    "intermediate_size": 52,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}
SETTINGS = {"num_blocks": 600, "max_num_seqs": 32, "max_num_batched_tokens": 256}
SMALL = 0.01  # MiB: many buckets even of a tiny model


def weights(version, dtype=torch.float32):
    """The decoder that a trainer has after `version` updates."""
    decoder = tiny.decoder(spec_from(MODEL), dtype)
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.mul_(1 + 0.1 * version)
    return decoder


def start(dtype=torch.float32, settings=None, **remote):
    config = EngineConfig(**(SETTINGS | (settings or {})))
    told = RemoteConfig(**({"threads": 1, "bucket_mb": SMALL, "patience": 20} | remote))
    return RemoteEngine(MODEL, config, dtype=dtype, eos_ids=(7,), remote=told)


def local(version, dtype=torch.float32, settings=None):
    return Engine(weights(version, dtype), EngineConfig(**(SETTINGS | (settings or {}))), eos_ids=(7,))


def drain(engine, said=None, versions=None):
    said = tiny.Said() if said is None else said
    while engine.has_work:
        outputs = engine.step()
        said.hear(outputs)
        for output in outputs:
            if versions is not None:
                versions.setdefault(output.request_id, []).extend([output.version] * len(output.tokens))
    return said


def ask(engine, *numbers, **params):
    for number in numbers:
        engine.submit(tiny.request(number, **params))


@pytest.fixture(scope="module")
def engines():
    """One for each transport, for all tests that leave it well."""
    with start() as shared, start(transport="gloo") as gloo:
        yield {"shared": shared, "gloo": gloo}


@pytest.fixture
def engine(engines):
    return engines["shared"]


def send(engine, version):
    return engine.load_weights(decoder_tensors(weights(version)), version=engine.version + 1)


@pytest.mark.parametrize(("dtype", "transport"), [(torch.float32, "shared"), (torch.bfloat16, "gloo")])
def test_the_same_bits_as_an_engine_in_this_process(dtype, transport):
    """The first weights may have version 0; fp32 masters are narrowed on the way."""
    with start(dtype, transport=transport) as far:
        told = far.load_weights(decoder_tensors(weights(0)), version=0)
        assert told.version == far.version == 0 and told.pause is not None and told.nbytes >= 4 * 1000
        ask(far, *range(8))
        found = drain(far)
        near = Engine(weights(0).to(dtype), EngineConfig(**SETTINGS), eos_ids=(7,))
        ask(near, *range(8))
        assert found == drain(near) and len(found) == 8
        far.load_weights(decoder_tensors(weights(1)), version=1)
        ask(far, *range(8))
        again = drain(far)
        assert again != found and far.version == 1
        assert far.stats().version == 1


def test_rollouts_are_those_of_an_engine_in_this_process(engine):
    """The same function drives both: samples of prompts with tools in between, every token and log-probability."""
    send(engine, 1)
    version = send(engine, 0).version
    near = local(0)
    near.load_weights(None, version)
    params = SamplingParams(max_tokens=30, stop_token_ids=tuple(range(90, 94)), ignore_eos=True)
    prompts = [prompt(number, 9 + 7 * number) for number in range(4)]

    def tool(_, messages):
        return (50, 51, 52) if len(messages) < 4 else None

    far, here = (
        sorted(
            rollout(each, prompts, 3, params, seed=11, words=BareWords(), turn=tool),
            key=lambda group: group.prompt.number,
        )
        for each in (engine, near)
    )
    assert far == here
    assert {v for group in far for r in group.rollouts for v in r.versions} == {version}
    assert any(False in r.mine for group in far for r in group.rollouts)


def test_a_quantized_generator_rounds_what_comes():
    settings = {"quantization": "int8"}
    with start(settings=settings) as far:
        for version in (0, 1):
            far.load_weights(decoder_tensors(weights(version)), version)
        ask(far, *range(4))
        near = Engine(tiny.rounded(weights(1), "int8"), EngineConfig(**SETTINGS), eos_ids=(7,))
        ask(near, *range(4))
        assert drain(far) == drain(near)


def test_requests_wait_for_the_first_weights():
    with start() as far:
        ask(far, 1)
        with pytest.raises(StateError, match="no weights"):
            far.step()
        far.load_weights(decoder_tensors(weights(0)), 0)
        assert len(drain(far)["r1"]) == 12


def test_new_weights_in_the_middle_of_rollouts(engine):
    """Tokens say which weights made them, and those behind the swap are what these weights would have said."""
    before, after = 0, 5
    send(engine, before)
    old = engine.version
    ask(engine, 1, 5, max_tokens=1500)
    said, versions = tiny.Said(), {}
    for _ in range(5):
        outputs = engine.step()
        said.hear(outputs)
        for output in outputs:
            versions.setdefault(output.request_id, []).extend([output.version] * len(output.tokens))
    told = send(engine, after)
    assert told.pause is not None and told.pause < 1.0
    drain(engine, said, versions)
    for name, tokens in said.items():
        made_by = versions[name]
        assert set(made_by) == {old, old + 1} and made_by == sorted(made_by)
        cut = made_by.count(old)
        number = int(name[1:])
        first, then = local(before), local(after)
        ask(first, number, max_tokens=cut)
        assert drain(first)[name] == tokens[:cut]
        rest = tiny.request(number, max_tokens=1500)
        rest.output_ids = [token.id for token in tokens[:cut]]
        then.submit(rest)
        assert drain(then)[name] == tokens[cut:]


def test_it_generates_on_while_weights_travel(engine):
    """Two threads of requests' life: tokens of the old weights come while the buckets of the new ones do."""
    send(engine, 0)
    old = engine.version
    ask(engine, 1, max_tokens=3000)
    seen = []

    def slowly():
        for pair in decoder_tensors(weights(1)):
            time.sleep(0.01)
            seen.append(sum(map(len, said.values())))
            yield pair

    said, versions = tiny.Said(), {}
    reader = threading.Thread(target=drain, args=(engine, said, versions))
    reader.start()
    engine.load_weights(slowly(), old + 1)
    reader.join(60)
    assert not reader.is_alive()
    assert seen[-1] > seen[0]  # tokens came between the first bucket and the last
    assert versions["r1"].count(old) >= seen[-1] and versions["r1"][-1] == old + 1


def test_staged_weights_wait_until_they_are_swapped_in(engine):
    """So requests may end with the weights they began with."""
    send(engine, 0)
    old = engine.version
    ask(engine, 1, 5, max_tokens=600)
    told = engine.stage(decoder_tensors(weights(3)), old + 1)
    assert told.pause is None and engine.version == old
    versions = {}
    drain(engine, versions=versions)
    assert {*versions["r1"], *versions["r5"]} == {old}
    assert engine.swap().pause is not None and engine.version == old + 1
    ask(engine, 2)
    near = local(3)
    ask(near, 2)
    assert drain(engine) == drain(near)
    with pytest.raises(StateError, match="stage some first"):
        engine.swap()
    engine.stage(decoder_tensors(weights(1)), old + 2)  # replaced before it was used
    send(engine, 3)
    ask(engine, 2)
    near = local(3)
    ask(near, 2)
    assert drain(engine) == drain(near)


def damaged(engine, monkeypatch):
    real, count = remotes.checksum, iter(range(1000))
    monkeypatch.setattr(remotes, "checksum", lambda data: real(data) ^ (next(count) == 3))


@pytest.mark.parametrize("transport", ["shared", "gloo"])
@pytest.mark.parametrize("way", ["damaged", "missing", "raises"])
def test_a_torn_transfer_leaves_the_old_weights_in_force(way, transport, monkeypatch, engines):
    far = engines[transport]
    old = send(far, 0).version
    ask(far, 1, 5, max_tokens=400)
    pairs = list(decoder_tensors(weights(1)))

    def breaks():
        yield from pairs[:-2]
        raise RuntimeError("the trainer stumbled")

    if way == "damaged":
        with monkeypatch.context() as patch:
            damaged(far, patch)
            with pytest.raises(WorkerError, match=f"arrived damaged; version {old} stays in force"):
                far.load_weights(iter(pairs), old + 1)
    elif way == "missing":
        with pytest.raises(CheckpointError, match="did not come"):
            far.load_weights(iter(pairs[:-1]), old + 1)
    else:
        with pytest.raises(RuntimeError, match="stumbled"):
            far.load_weights(breaks(), old + 1)
    with pytest.raises(CheckpointError, match="did not come"):  # at once again: the first answer is not for this one
        far.load_weights(iter(pairs[:-1]), old + 1)
    versions = {}
    said = drain(far, versions=versions)
    near = local(0)
    ask(near, 1, 5, max_tokens=400)
    assert said == drain(near) and {*versions["r1"], *versions["r5"]} == {old}
    for _ in range(3):  # and nothing is used up: the same version may come again, and others
        far.load_weights(decoder_tensors(weights(1)), far.version + 1)
    ask(far, 3)
    near = local(1)
    ask(near, 3)
    assert drain(far) == drain(near)


def test_death_is_told_with_last_words_and_a_restart_goes_on():
    """Requests under way go on behind what they have said; with the same weights, with the same bits."""
    with start() as far:
        far.load_weights(decoder_tensors(weights(0)), 0)
        ask(far, 1, 5, max_tokens=900)
        said = tiny.Said()
        for _ in range(20):
            said.hear(far.step())
        began = time.monotonic()
        os.kill(far.pid, signal.SIGABRT)
        with pytest.raises(WorkerError, match=r"signal 6[^\n]*\nits last words:\n(.|\n)*Fatal Python error: Aborted"):
            drain(far, said)
        assert time.monotonic() - began < 10
        with pytest.raises(WorkerError, match="gone"):
            ask(far, 2)
        far.restart()
        far.load_weights(decoder_tensors(weights(0)), 0)
        drain(far, said)
        near = local(0)
        ask(near, 1, 5, max_tokens=900)
        assert said == drain(near)


def test_a_hung_process_is_noticed_and_ended():
    with start(patience=1.5) as far:
        far.load_weights(decoder_tensors(weights(0)), 0)
        ask(far, 1, max_tokens=3000)
        os.kill(far.pid, signal.SIGSTOP)
        began = time.monotonic()
        with pytest.raises(WorkerError, match=r"no sign of life for 1\.5 s"):
            drain(far)
        assert time.monotonic() - began < 15


def test_death_in_the_middle_of_a_transfer_is_told():
    with start() as far:
        pairs = decoder_tensors(weights(0))

        def dies():
            yield next(pairs)
            os.kill(far.pid, signal.SIGKILL)
            yield from pairs

        with pytest.raises(WorkerError, match="signal 9"):
            far.load_weights(dies(), 0)
        far.restart()
        far.load_weights(decoder_tensors(weights(0)), 0)
        ask(far, 2)
        assert len(drain(far)["r2"]) == 12


def test_a_process_that_cannot_begin_says_why(monkeypatch):
    with pytest.raises(WorkerError, match="kv_cache_memory_bytes is 1, less than one block"):
        start(settings={"num_blocks": None, "kv_cache_memory_bytes": 1})
    with pytest.raises(WorkerError, match="exit code 3"):
        start(launcher=(sys.executable, "-c", "import sys; sys.exit(3)"))
    monkeypatch.setattr(Buckets, "fingerprint", property(lambda self: "another"))
    with pytest.raises(WorkerError, match="lays its weights out otherwise"):
        start()


def test_another_way_to_start_it_with_gloo_alone():
    """What `ssh host` would be: a command in front, standard input and output, and nothing else in common."""
    with start(launcher=("env", "-u", "DISPLAY"), transport="gloo", address="127.0.0.1") as far:
        far.load_weights(decoder_tensors(weights(0)), 0)
        ask(far, 2)
        assert len(drain(far)["r2"]) == 12


def test_aborted_requests_say_no_more_than_that(engine):
    send(engine, 0)
    ask(engine, 1, 5, max_tokens=500)
    said = tiny.Said()
    said.hear(engine.step())
    engine.abort("r1")
    engine.abort("nobody")
    had = len(said.get("r1", ()))
    drain(engine, said)
    assert len(said["r1"]) == had and said.ends["r1"].finish is State.ABORT
    assert len(said["r5"]) == 500
    ask(engine, 1)  # its id is free again
    assert len(drain(engine)["r1"]) == 12


def test_what_cannot_be_is_refused(engine):
    send(engine, 0)
    with pytest.raises(ConfigError, match="not above"):
        engine.load_weights(decoder_tensors(weights(0)), engine.version)
    with pytest.raises(ConfigError, match="weights of its own"):
        engine.load_weights(None, engine.version + 1)
    with pytest.raises(RequestError, match="token id 999"):
        bad = tiny.request(1)
        bad.prompt_ids = (999,)
        engine.submit(bad)
    ask(engine, 1)
    with pytest.raises(RequestError, match="in use"):
        ask(engine, 1)
    drain(engine)
    with pytest.raises(ConfigError, match="share no memory"):
        RemoteConfig(address="somewhere")


def test_sleep_and_wake_keep_requests(engine):
    send(engine, 0)
    ask(engine, 1, 5, max_tokens=1500)
    said = tiny.Said()
    said.hear(engine.step())
    engine.sleep()
    assert engine.stats().asleep and engine.stats().blocks_used == 0
    with pytest.raises(StateError, match="wake it"):
        while True:
            said.hear(engine.step())
    engine.wake()
    drain(engine, said)
    near = local(0)
    ask(near, 1, 5, max_tokens=1500)
    assert said == drain(near)
