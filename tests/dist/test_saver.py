"""What ranks save together, any other ranks go on from, with the losses of one process; never the whole in one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from test_axes import MOE
from test_zero import CONFIG, batch
from transformers import AutoModelForCausalLM
from world import run_ranks

from twofold.core import CheckpointError
from twofold.models import weights
from twofold.models.decoder import Decoder
from twofold.models.packed import PackedContext
from twofold.models.whole import WholeParameters
from twofold.parallel import Mesh, ParallelConfig
from twofold.parallel.layout import lay_out
from twofold.train import saver as saving
from twofold.train.axes import Axes
from twofold.train.build import build_model, build_offload, build_optimizer
from twofold.train.checkpoint import Checkpoints, Position, damage, read_position
from twofold.train.config import DataConfig, ModelConfig, OptimizerConfig, Recipe, RunConfig, ScheduleConfig
from twofold.train.files import ModelFiles
from twofold.train.init import init_weights
from twofold.train.journal import Unwritten
from twofold.train.pieces import Stored
from twofold.train.progress import Display
from twofold.train.saver import Saver, Snapshot
from twofold.train.state import MASTER, gathered, restore, weight_pieces
from twofold.train.trainer import Data, Trainer
from twofold.train.zero import local

SAVED, STEPS = 2, 4
ONE = ParallelConfig()
ZERO = ParallelConfig(zero=3)
BF16 = torch.bfloat16


class Batches:
    def batch(self, index: int):
        return batch(index)


def assembled(
    rank: int,
    world: int,
    parallel: ParallelConfig,
    folder: Path,
    step: int = 0,
    dtype: Any = "fp32",
    config: dict[str, Any] = CONFIG,
) -> Trainer:
    """A trainer of the test's model, from its first weights or the checkpoint of a step."""
    recipe = Recipe(
        kind="pretrain",
        model=ModelConfig(config=config, tokenizer=folder, dtype=dtype),
        data=DataConfig(train=("x",), seq_len=40, tokens_per_step=280, micro_tokens=60),
        schedule=ScheduleConfig(steps=100),
        run=RunConfig(output=folder, seed=5),
        optimizer=OptimizerConfig(lr=1e-2),
        parallel=parallel,
    )
    mesh = Mesh(lay_out(parallel, world), rank)
    axes, store = Axes(mesh, parallel), Checkpoints(folder / "checkpoints", 9)
    found = store.path(step) if step else None
    decoder, zero, places = build_model(recipe, found, axes, build_offload(recipe, mesh))
    optimizer = build_optimizer(decoder, recipe, axes, build_offload(recipe, mesh))
    position = Position()
    if found:
        position = read_position(found)
        restore(Stored(found), position, decoder, places, optimizer, mesh)
    return Trainer(
        decoder, optimizer, Data(train=Batches(), valid=[]), recipe,
        saver=Saver(store, ModelFiles(config, folder, least=12_000), mesh, attempt="a"),
        journal=Unwritten(), display=Display(1, Console(quiet=True)), words=None,
        position=position, axes=axes, zero=zero, places=places,
    )  # fmt: skip


def train(
    rank: int,
    world: int,
    parallel: ParallelConfig,
    folder: Path,
    first: int,
    last: int,
    dtype: str = "fp32",
    config: dict[str, Any] = CONFIG,
) -> list[float]:
    """The losses of steps first to last, from the checkpoint of step `first` to that of step `last`."""
    trainer = assembled(rank, world, parallel, folder, first, dtype, config)
    told = []
    for step in range(first, last):
        told.append(trainer.step(batch(step)).loss)
        trainer.position = Position(step=step + 1)
    trainer.save()
    trainer.saver.wait()
    trainer.mesh.wait()
    return told


def ranks(
    world: int,
    parallel: ParallelConfig,
    folder: Path,
    first: int,
    last: int,
    dtype: str = "fp32",
    config: dict[str, Any] = CONFIG,
) -> list[float]:
    told = run_ranks(world, train, world, parallel, folder, first, last, dtype, config)
    assert all(mine == told[0] for mine in told)
    return told[0]


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> tuple[Path, list[float]]:
    folder = tmp_path_factory.mktemp("alone")
    return folder, train(0, 1, ONE, folder, 0, STEPS)


def zero(stage, node: int | None = None) -> ParallelConfig:
    return ParallelConfig(zero=stage, node=node)


GOES_ON = [
    [(4, zero(3)), (1, ONE), (2, zero(0)), (3, zero(3))],
    [(4, zero("hybrid", 2)), (3, zero(1))],
    [(3, zero(0)), (2, ParallelConfig(tp=2))],
    [(4, ParallelConfig(tp=2, zero=3)), (2, ParallelConfig(pp=2))],
    [(4, ParallelConfig(pp=2, tp=2)), (1, ONE), (4, ParallelConfig(sp=2, zero=2))],
]
"""Who writes, and who reads it."""


def name(case: list[tuple[int, ParallelConfig]]) -> str:
    return "-".join(f"{world}({lay_out(config, world)})".replace(" ", "") for world, config in case)


@pytest.fixture(scope="module", params=GOES_ON, ids=name)
def saved(request, tmp_path_factory) -> tuple[Path, list[float], list[tuple[int, ParallelConfig]]]:
    """A checkpoint that some ranks wrote, the losses before it, and all concerned."""
    folder = tmp_path_factory.mktemp("saved")
    world, parallel = request.param[0]
    return folder, ranks(world, parallel, folder, 0, SAVED), request.param


def test_any_ranks_go_on(saved, alone, tmp_path: Path) -> None:
    folder, before, (_, *readers) = saved
    for number, (world, parallel) in enumerate(readers):
        copy = tmp_path / f"{number}"
        (copy / "checkpoints").mkdir(parents=True)
        (copy / "checkpoints" / f"step-{SAVED:08d}").symlink_to(folder / "checkpoints" / f"step-{SAVED:08d}")
        after = ranks(world, parallel, copy, SAVED, STEPS)
        assert before + after == pytest.approx(alone[1], abs=1e-6, rel=1e-6)


def test_the_files_are_those_of_one_process_and_of_transformers(saved, alone) -> None:
    folder, _, ((world, _), *_) = saved
    found = folder / "checkpoints" / f"step-{SAVED:08d}"
    assert damage(found) is None
    stored, wanted = Stored(found), Stored(alone[0] / "checkpoints" / f"step-{STEPS:08d}")
    assert stored.world == world
    names = {name for name in stored.entries if not name.startswith("rng.")}
    assert names == wanted.entries.keys() - {"rng.0"}
    assert all(stored.entries[name].shape == wanted.entries[name].shape for name in names)
    assert len(list(found.glob("model-*.safetensors"))) > 1, "several ranks write weights"
    model = AutoModelForCausalLM.from_pretrained(found).eval()
    ours, ids = weights.load(found), torch.tensor([5, 9, 60, 33])
    with torch.no_grad():
        truth = model(ids[None]).logits[0]
        torch.testing.assert_close(ours.logits(ours(ids, PackedContext([4]))), truth, atol=1e-4, rtol=1e-4)
    sizes = [f.stat().st_size for f in found.glob("state-*.safetensors")]
    assert len(sizes) == world and max(sizes) < 1.6 * sum(sizes) / world, "each writes its share"


EXPERTS = [(4, ParallelConfig(ep=2, zero=3)), (2, ParallelConfig(ep=2, zero=1)), (4, ParallelConfig(ep=2, tp=2))]


def test_divided_experts_go_on_divided_otherwise(tmp_path: Path) -> None:
    (world, parallel), *others = EXPERTS
    truth = train(0, 1, ONE, tmp_path / "one", 0, STEPS, config=MOE)
    before = ranks(world, parallel, tmp_path / "experts", 0, SAVED, config=MOE)
    written = tmp_path / "experts" / "checkpoints" / f"step-{SAVED:08d}"
    for number, (world, parallel) in enumerate([*others, (1, ONE)]):
        copy = tmp_path / f"{number}" / "checkpoints"
        copy.mkdir(parents=True)
        (copy / written.name).symlink_to(written)
        after = ranks(world, parallel, copy.parent, SAVED, STEPS, config=MOE)
        assert before + after == pytest.approx(truth, abs=1e-5, rel=1e-5)


@pytest.mark.parametrize("parallel", [ZERO, ParallelConfig(tp=2)], ids=["zero", "tp"])
def test_masters_of_narrow_weights_go_round(tmp_path: Path, parallel: ParallelConfig) -> None:
    before = ranks(2, parallel, tmp_path, 0, SAVED, "bf16")
    found = tmp_path / "checkpoints" / f"step-{SAVED:08d}"
    stored, whole = Stored(found), WholeParameters(found)
    assert whole.stored == BF16
    masters = [entry for entry in stored.entries if entry.startswith(MASTER)]
    assert len(masters) == len(list(Decoder(whole.spec, device="meta").parameters()))
    for entry in masters:
        master = stored.read(entry)
        assert master.dtype == torch.float32
        assert torch.equal(master.bfloat16().float(), whole[entry.removeprefix(MASTER)])
    after = train(0, 1, ONE, tmp_path, SAVED, STEPS, "bf16")
    truth = train(0, 1, ONE, tmp_path / "one", 0, STEPS, "bf16")
    assert before + after == pytest.approx(truth, abs=2e-2)


def test_no_rank_holds_more_than_its_part(tmp_path: Path) -> None:
    parts = run_ranks(4, _parts, tmp_path)
    whole = sum(p.numel() for p in first_model().parameters())
    assert sum(numbers for numbers, _ in parts) == whole
    assert max(room for _, room in parts) < 4 * 1.05 * whole / 4


def first_model() -> Decoder:
    decoder = Decoder(weights.spec_from(CONFIG))
    init_weights(decoder, 5)
    return decoder


def _parts(rank: int, folder: Path) -> tuple[int, int]:
    """Numbers and bytes of what a rank holds, each of which is the rank's part of the whole."""
    trainer = assembled(rank, 4, ZERO, folder)
    truth = dict(first_model().named_parameters())
    mine = {n: local(p.detach()) for n, p in trainer.decoder.named_parameters()}
    for n, part in mine.items():
        assert torch.equal(part, trainer.places[n].take(truth[n].detach())), n
    return sum(p.numel() for p in mine.values()), sum(p.untyped_storage().nbytes() for p in mine.values())


@pytest.mark.parametrize("parallel", [ParallelConfig(tp=2, pp=2), ParallelConfig(tp=2, zero=3)], ids=["pp", "zero"])
def test_the_main_rank_can_have_it_whole(tmp_path: Path, parallel: ParallelConfig) -> None:
    assert run_ranks(4, _whole, parallel, tmp_path) == [True, None, None, None]


def _whole(rank: int, parallel: ParallelConfig, folder: Path) -> bool | None:
    trainer = assembled(rank, 4, parallel, folder)
    with torch.no_grad():
        pieces = weight_pieces(trainer.decoder, trainer.places, torch.float32)
        decoder = gathered(pieces, trainer.places.spec, torch.float32, trainer.mesh)
    if decoder is None:
        return None
    truth = dict(first_model().named_parameters())
    return all(torch.equal(p, truth[n]) for n, p in decoder.named_parameters())


def test_a_rank_that_cannot_write_fails_all(tmp_path: Path) -> None:
    for said in run_ranks(2, _full, tmp_path):
        assert "the checkpoint of step 0 could not be written: rank 1: model-" in said and "No space" in said
    assert list((tmp_path / "checkpoints").iterdir()) == []


def _full(rank: int, folder: Path) -> str:
    trainer = assembled(rank, 2, ZERO, folder)
    if rank == 1:
        saving.write_shard = _no_space
    pieces = weight_pieces(trainer.decoder, trainer.places, torch.float32)
    trainer.saver.save(Snapshot(position=Position(), weights=pieces, states={}))
    try:
        trainer.saver.wait()
    except CheckpointError as error:
        trainer.mesh.wait()
        return str(error)
    return "nothing"


def _no_space(path: Path, items) -> None:
    for item in items[:1]:
        item.values()
    raise OSError(28, "No space left on device")


def test_all_ranks_find_the_same_newest_one(tmp_path: Path) -> None:
    for step in (2, 3):
        train(0, 1, ONE, tmp_path, 0, step)
    index = tmp_path / "checkpoints" / "step-00000003" / "state.index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"world": 3}))
    found = run_ranks(2, _latest, tmp_path)
    assert found[0] == found[1]
    assert found[0][0].endswith("step-00000002") and "state.index.json: " in found[0][1][0]


def _latest(rank: int, folder: Path) -> tuple[str, list[str]]:
    group = Mesh(lay_out(ZERO, 2), rank).group("world")
    path, notes = Checkpoints(folder / "checkpoints", 1).latest(group)
    return str(path), notes


def test_the_model_alone_is_exported_by_all(tmp_path: Path) -> None:
    run_ranks(2, _export, tmp_path)
    found = {k: v for f in (tmp_path / "model").glob("*.safetensors") for k, v in load_file(f).items()}
    truth = dict(weights.decoder_tensors(first_model()))
    assert found.keys() == truth.keys()
    assert all(torch.equal(found[name], tensor.bfloat16()) for name, tensor in truth.items())


def _export(rank: int, folder: Path) -> None:
    trainer = assembled(rank, 2, ZERO, folder)
    pieces = weight_pieces(trainer.decoder, trainer.places, torch.float32, BF16)
    trainer.saver.export(folder / "model", pieces, BF16)
    trainer.mesh.wait()
