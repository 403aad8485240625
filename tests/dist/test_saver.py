"""What ranks save together, any other ranks go on from, with the losses of one process; never the whole in one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_zero import CONFIG, batch
from torch import Tensor
from transformers import AutoModelForCausalLM
from world import run_ranks

from twofold.core import CheckpointError
from twofold.models import weights
from twofold.models.decoder import Decoder
from twofold.models.packed import PackedContext
from twofold.models.whole import WholeParameters
from twofold.parallel import Layout, Mesh, ParallelConfig
from twofold.parallel.layout import lay_out
from twofold.train import loss as losses
from twofold.train import saver as saving
from twofold.train.checkpoint import Checkpoints, Position, damage, read_position
from twofold.train.config import OptimizerConfig
from twofold.train.files import ModelFiles
from twofold.train.init import FirstWeights, init_weights
from twofold.train.optimizer import Optimizer
from twofold.train.pieces import Stored
from twofold.train.saver import Saver, Snapshot
from twofold.train.share import share
from twofold.train.state import MASTER, fill, held, restore, state_pieces, weight_pieces
from twofold.train.zero import Zero, local

SAVED, STEPS = 3, 5
BF16 = torch.bfloat16


def divided(mesh: Mesh, folder: Path | None, dtype: torch.dtype = torch.float32) -> tuple[Decoder, Zero]:
    """A decoder, its weights from a checkpoint or the first ones; alone it is made whole."""
    stored = Stored(folder) if folder else None
    if mesh.alone:
        decoder = weights.load(folder, dtype=dtype) if folder else Decoder(weights.spec_from(CONFIG), dtype=dtype)
        if not folder:
            init_weights(decoder, 5)
        return decoder, Zero(decoder, mesh)
    decoder = Decoder(weights.spec_from(CONFIG), device="meta")
    first = WholeParameters(folder) if folder else FirstWeights(Decoder(decoder.spec, device="meta"), 5)
    zero = Zero(decoder, mesh, None if dtype == torch.float32 else dtype)

    def value(name: str, place) -> Tensor:
        master = MASTER + name
        return stored.read(master, place) if stored and master in stored.entries else place.take(first[name])

    fill(decoder, "cpu", value)
    return decoder, zero


def train(rank: int, layout: Layout, folder: Path, first: int, last: int, dtype=torch.float32) -> list[float]:
    """The losses of steps first to last, from the checkpoint of step `first` to that of step `last`."""
    mesh = Mesh(layout, rank)
    store = Checkpoints(folder / "checkpoints", 9)
    found = store.path(first) if first else None
    decoder, zero = divided(mesh, found, dtype)
    optimizer = Optimizer(decoder, OptimizerConfig(lr=1e-2), total=lambda x: mesh.sum("norm", x)[0])
    if found:
        restore(Stored(found), read_position(found), decoder, optimizer, mesh)
    told = []
    for step in range(first, last):
        whole = batch(step)
        targets = int((whole.targets_T != losses.IGNORE).sum())
        parts = share(whole, mesh.size("data"), mesh.rank("data"), 60)
        summed = 0.0
        for number, part in enumerate(parts, 1):
            zero.micro_batch(last=number == len(parts))
            hidden_TD = decoder(part.ids_T, PackedContext(part.lengths))
            summed += losses.backward(decoder, hidden_TD, part.targets_T, targets, 97)
            optimizer.collect()
        optimizer.clip()
        optimizer.step(1e-2)
        optimizer.zero()
        told.append(mesh.sum("loss", summed)[0] / targets)
    zero.settle()
    saver = Saver(store, ModelFiles(CONFIG, folder, least=12_000), mesh, attempt="a")
    states = state_pieces(decoder, optimizer, mesh, dtype)
    saver.save(Snapshot(position=Position(step=last), weights=weight_pieces(decoder, dtype), states=states))
    saver.wait()
    mesh.wait()
    return told


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> tuple[Path, list[float]]:
    folder = tmp_path_factory.mktemp("alone")
    return folder, train(0, Layout(), folder, 0, STEPS)


def laid(world: int, stage, node: int | None = None) -> Layout:
    return lay_out(ParallelConfig(zero=stage, node=node), world)


GOES_ON = {
    (4, 3, None): [(1, 0, None), (2, 0, None), (3, 3, None)],
    (4, "hybrid", 2): [(3, 1, None)],
    (2, 2, None): [(4, "hybrid", 2)],
    (3, 0, None): [(2, 3, None)],
}
"""Who wrote, ranks and stage, and who reads it."""


@pytest.fixture(scope="module", params=GOES_ON, ids=str)
def saved(request, tmp_path_factory) -> tuple[Path, list[float], tuple]:
    """A checkpoint that some ranks wrote, the losses before it, and who they were."""
    folder = tmp_path_factory.mktemp("saved")
    told = run_ranks(request.param[0], train, laid(*request.param), folder, 0, SAVED)
    assert all(t == told[0] for t in told)
    return folder, told[0], request.param


def test_any_ranks_go_on(saved, alone, tmp_path: Path) -> None:
    folder, before, writers = saved
    for readers in GOES_ON[writers]:
        copy = tmp_path / f"{readers[0]}"
        (copy / "checkpoints").mkdir(parents=True)
        (copy / "checkpoints" / f"step-{SAVED:08d}").symlink_to(folder / "checkpoints" / f"step-{SAVED:08d}")
        after = run_ranks(readers[0], train, laid(*readers), copy, SAVED, STEPS)[0]
        assert before + after == pytest.approx(alone[1], abs=1e-6, rel=1e-6)


def test_the_files_are_those_of_one_process_and_of_transformers(saved, alone) -> None:
    folder, _, (world, *_) = saved
    found = folder / "checkpoints" / f"step-{SAVED:08d}"
    assert damage(found) is None
    stored = Stored(found)
    wanted = Stored(alone[0] / "checkpoints" / f"step-{STEPS:08d}")
    assert stored.world == world
    names = {name for name in stored.entries if not name.startswith("rng.")}
    assert names == wanted.entries.keys() - {"rng.0"}
    assert all(stored.entries[name].shape == wanted.entries[name].shape for name in names)
    files = sorted(found.glob("model-*.safetensors"))
    assert len(files) > 1, "several ranks write weights"
    model = AutoModelForCausalLM.from_pretrained(found).eval()
    ours, ids = weights.load(found), torch.tensor([5, 9, 60, 33])
    with torch.no_grad():
        truth = model(ids[None]).logits[0]
        torch.testing.assert_close(ours.logits(ours(ids, PackedContext([4]))), truth, atol=1e-4, rtol=1e-4)
    sizes = [f.stat().st_size for f in found.glob("state-*.safetensors")]
    assert len(sizes) == world and max(sizes) < 1.35 * sum(sizes) / world, "each writes its share"


def test_masters_of_narrow_weights_go_round(tmp_path: Path) -> None:
    before = run_ranks(2, train, laid(2, 3), tmp_path, 0, SAVED, BF16)[0]
    found = tmp_path / "checkpoints" / f"step-{SAVED:08d}"
    stored, whole = Stored(found), WholeParameters(found)
    assert whole.stored == BF16
    for name in [n for n in stored.entries if n.startswith(MASTER)]:
        master = stored.read(name)
        assert master.dtype == torch.float32
        assert torch.equal(master.bfloat16().float(), whole[name.removeprefix(MASTER)])
    after = run_ranks(1, train, Layout(), tmp_path, SAVED, STEPS, BF16)[0]
    truth = train(0, Layout(), tmp_path / "one", 0, STEPS, BF16)
    assert before + after == pytest.approx(truth, abs=2e-2)
    stored = Stored(tmp_path / "checkpoints" / f"step-{STEPS:08d}")
    assert any(n.startswith(MASTER) for n in stored.entries)


def test_no_rank_holds_more_than_its_part() -> None:
    parts = run_ranks(4, _parts)
    whole = sum(p.numel() for p in Decoder(weights.spec_from(CONFIG), device="meta").parameters())
    assert sum(numbers for numbers, _ in parts) == whole
    assert max(room for _, room in parts) < 4 * 1.05 * whole / 4


def _parts(rank: int) -> tuple[int, int]:
    """Numbers and bytes of what a rank holds, each of which is the rank's part of the whole."""
    decoder, _ = divided(Mesh(laid(4, 3), rank), None)
    whole = Decoder(weights.spec_from(CONFIG))
    init_weights(whole, 5)
    truth = dict(whole.named_parameters())
    for name, parameter in decoder.named_parameters():
        assert torch.equal(local(parameter.detach()), held(parameter).take(truth[name].detach())), name
    mine = [local(p.detach()) for p in decoder.parameters()]
    return sum(p.numel() for p in mine), sum(p.untyped_storage().nbytes() for p in mine)


def test_a_rank_that_cannot_write_fails_all(tmp_path: Path) -> None:
    for said in run_ranks(2, _full, tmp_path):
        assert "the checkpoint of step 3 could not be written: rank 1: model-" in said and "No space" in said
    assert list((tmp_path / "checkpoints").iterdir()) == []


def _full(rank: int, folder: Path) -> str:
    mesh = Mesh(laid(2, 3), rank)
    decoder, _ = divided(mesh, None)
    saver = Saver(Checkpoints(folder / "checkpoints", 1), ModelFiles(CONFIG, folder, least=1000), mesh)
    if rank == 1:
        saving.write_shard = _no_space
    saver.save(Snapshot(position=Position(step=3), weights=weight_pieces(decoder, torch.float32), states={}))
    try:
        saver.wait()
    except CheckpointError as error:
        mesh.wait()
        return str(error)
    return "nothing"


def _no_space(path: Path, items) -> None:
    for item in items[:1]:
        item.values()
    raise OSError(28, "No space left on device")


def test_all_ranks_find_the_same_newest_one(tmp_path: Path) -> None:
    for step in (2, 3):
        train(0, Layout(), tmp_path, 0, step)
    index = tmp_path / "checkpoints" / "step-00000003" / "state.index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"world": 3}))
    found = run_ranks(2, _latest, tmp_path)
    assert found[0] == found[1]
    assert found[0][0].endswith("step-00000002") and "state.index.json: " in found[0][1][0]


def _latest(rank: int, folder: Path) -> tuple[str, list[str]]:
    path, notes = Checkpoints(folder / "checkpoints", 1).latest(Mesh(laid(2, 1), rank).group("world"))
    return str(path), notes


def test_the_model_alone_is_exported_by_all(tmp_path: Path) -> None:
    run_ranks(2, _export, tmp_path)
    found = load_file(tmp_path / "model" / "model.safetensors")
    whole = Decoder(weights.spec_from(CONFIG))
    init_weights(whole, 5)
    truth = dict(weights.decoder_tensors(whole))
    assert found.keys() == truth.keys()
    assert all(torch.equal(found[name], tensor.bfloat16()) for name, tensor in truth.items())


def _export(rank: int, folder: Path) -> None:
    mesh = Mesh(laid(2, 3), rank)
    decoder, _ = divided(mesh, None)
    saver = Saver(Checkpoints(folder / "checkpoints", 1), ModelFiles(CONFIG, folder), mesh)
    saver.export(folder / "model", weight_pieces(decoder, torch.float32, BF16), BF16)
    mesh.wait()
