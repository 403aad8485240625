"""One storage for trainer and engine: nothing is copied, nothing stale is found, memory serves both in turn."""

from __future__ import annotations

import ctypes

import pytest
import torch

from tests.parity import tiny
from tests.parity.bare_words import BareWords, prompt
from twofold.align.episode import Rollout
from twofold.align.ledger import Ledger, of_engine, of_model, of_rollouts, of_trainer, size
from twofold.align.rollout import rollout
from twofold.align.sync import Shared, different, sync
from twofold.core import ConfigError, StateError
from twofold.engine.config import EngineConfig
from twofold.engine.sampling import SamplingParams
from twofold.kernels import native
from twofold.models.packed import PackedContext
from twofold.parallel import Mesh, ParallelConfig
from twofold.parallel.layout import lay_out
from twofold.train.config import OptimizerConfig
from twofold.train.optimizer import Optimizer
from twofold.train.zero import Zero

WORDS = BareWords()
CONFIG = EngineConfig(num_blocks=60, max_num_seqs=8, max_num_batched_tokens=256)
PARAMS = SamplingParams(max_tokens=10, temperature=0.8)
NATIVE = pytest.mark.skipif(bool(native.missing()), reason=native.missing())


def roll(engine) -> list[Rollout]:
    groups = list(rollout(engine, [prompt(i, 40) for i in range(3)], 2, PARAMS, seed=1, words=WORDS))
    return [each for group in sorted(groups, key=lambda g: g.prompt.number) for each in group.rollouts]


def update(decoder, optimizer) -> None:
    """One step of the trainer."""
    ids = torch.arange(20, 60)
    (-decoder.logprobs(decoder(ids, PackedContext([40])), ids.roll(-1)).mean()).backward()
    optimizer.clip()
    optimizer.step(0.05)
    optimizer.zero()


def trainer(name="llama"):
    decoder = tiny.decoder(tiny.SPECS[name])
    zero = Zero(decoder, Mesh(lay_out(ParallelConfig(), 1), 0))
    return decoder, zero, Optimizer(decoder.named_parameters(), OptimizerConfig(lr=0.05))


@pytest.mark.parametrize("name", ["llama", "moe", "gemma2"])
def test_after_a_step_the_engine_is_as_one_made_anew_and_nothing_was_copied(name):
    decoder, zero, optimizer = trainer(name)
    shared = Shared(zero, CONFIG, eos_ids=(7,), keep_cache=True)
    with shared.awake(0) as engine:
        first = roll(engine)
    where = {each: weight.data_ptr() for each, weight in decoder.named_parameters()}
    for version in (1, 2):
        update(decoder, optimizer)
        with shared.awake(version) as engine:
            found = roll(engine)
            assert not different(decoder, engine.decoder)
        assert {each: weight.data_ptr() for each, weight in decoder.named_parameters()} == where
        assert shared.last.moved == 0 and shared.last.tensors == len(where) and not shared.last.rewritten
        assert shared.last.nbytes == sum(weight.nbytes for weight in decoder.parameters())
        assert {each for one in found for each in one.versions} == {version}
        fresh = tiny.decoder(tiny.SPECS[name])
        with torch.no_grad():
            for mine, other in zip(fresh.parameters(), decoder.parameters(), strict=True):
                mine.copy_(other)
        anew = roll(tiny.engine(fresh))
        assert [(each.ids, each.logprobs) for each in found] == [(each.ids, each.logprobs) for each in anew]
        assert found != first
    assert engine.runner.compilations == 1


@NATIVE
def test_the_compiled_program_points_at_the_trainers_weights():
    decoder, zero, _ = trainer()
    with Shared(zero, CONFIG).awake(1) as engine:
        pointers = {int(number) for part in engine.runner.program._written for number in _words(part)}
        assert all(weight.data_ptr() in pointers for weight in decoder.parameters())


def _words(part: list[ctypes.Structure]):
    """Every aligned 8 bytes of a program's stages."""
    for stage in part:
        raw = bytes(stage)
        yield from memoryview(raw[: len(raw) // 8 * 8]).cast("Q")


def test_nothing_that_older_weights_computed_is_found():
    decoder, zero, optimizer = trainer()
    shared = Shared(zero, CONFIG, eos_ids=(7,), keep_cache=True)
    with shared.awake(0) as engine:
        roll(engine)
        hits = engine.stats().prefix_hits
        roll(engine)
        assert engine.stats().prefix_hits - hits == 6 * 32, "each sample finds its whole blocks"
    update(decoder, optimizer)
    with shared.awake(1) as engine:
        hits = engine.stats().prefix_hits
        roll(engine)
        assert engine.stats().prefix_hits - hits == 3 * 32, "one of each group computes them"


@NATIVE
def test_a_program_is_written_anew_when_a_weight_moved():
    decoder, zero, _ = trainer()
    shared = Shared(zero, CONFIG, eos_ids=(7,), keep_cache=True)
    with shared.awake(0) as engine:
        before = roll(engine)
    weight = decoder.layers[1].down
    old = weight.weight.data
    weight.weight.data = old.clone()
    old.fill_(torch.nan)  # a program that still reads there is found out
    with shared.awake(1) as engine:
        assert [(each.ids, each.logprobs) for each in roll(engine)] == [(each.ids, each.logprobs) for each in before]
    assert shared.last.rewritten and engine.runner.compilations == 2


def test_an_engine_with_weights_of_its_own_is_refused():
    decoder, engine = tiny.decoder(tiny.SPECS["llama"]), tiny.engine(tiny.decoder(tiny.SPECS["llama"]))
    with pytest.raises(StateError, match="tensors of its own"):
        sync(decoder, engine, 1)
    assert len(different(decoder, engine.decoder)) == len(list(decoder.parameters()))


def test_versions_only_grow():
    _, zero, _ = trainer()
    shared = Shared(zero, CONFIG)
    with shared.awake(7):
        pass
    with shared.awake(7) as engine:
        assert engine.version == 7, "no weight has changed since"
    with pytest.raises(ConfigError, match="count versions upwards"), shared.awake(6):
        pass
    assert shared.engine.asleep, "also when it was refused"


def test_the_cache_is_given_back_while_the_trainer_steps_and_the_ledger_shows_it():
    decoder, zero, optimizer = trainer()
    shared, ledger, made = Shared(zero, CONFIG), Ledger(), []
    of_trainer(ledger, zero, optimizer)
    of_engine(ledger, lambda: shared.engine)
    of_model(ledger, "reference", reference := tiny.decoder(tiny.SPECS["alibi"]))
    ledger.holds("rollouts", lambda: of_rollouts(made))
    with shared.awake(0) as engine:
        made = roll(engine)
        awake = ledger.read("rollout")
        assert awake["KV cache"] == engine.runner.cache.nbytes > 60 * 16 * 2 * 2 * 24 * 4
    weights = sum(weight.nbytes for weight in decoder.parameters())
    assert awake["weights"] == weights and awake["engine's weights"] == awake["gathered"] == 0
    assert awake["reference"] == sum(weight.nbytes for weight in reference.parameters())
    assert awake["gradients"] == awake["states"] == 0 < awake["rollouts"]
    assert engine.asleep
    update(decoder, optimizer)
    ids = torch.arange(20, 60)
    decoder.logprobs(decoder(ids, PackedContext([40])), ids).mean().backward()
    busy = ledger.read("update")
    assert busy["KV cache"] == busy["program"] == 0
    assert weights <= busy["gradients"] < 1.01 * weights, "some lie in storage a little larger"
    assert busy["states"] == 2 * weights
    assert ledger.record()["update"]["total"] == sum(busy.values())
    head, one, two = ledger.table().splitlines()
    assert head.split()[:2] == ["phase", "weights"] and "gathered" not in head and "engine's" not in head
    assert one.startswith("rollout") and two.startswith("update") and "-" in two


def test_sizes_for_people():
    assert [size(n) for n in (0, 7, 2048, 5 * 2**20, 3 * 2**40)] == ["-", "7 B", "2 KiB", "5 MiB", "3 TiB"]
