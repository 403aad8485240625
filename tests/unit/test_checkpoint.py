"""Checkpoints: whole or not there; what is damaged is named and the one before is used."""

import json
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from twofold.core import CheckpointError
from twofold.models.shards import Pending
from twofold.parallel import Mesh
from twofold.train import checkpoint
from twofold.train.checkpoint import Checkpoints, Position, read_position, replace_directory
from twofold.train.pieces import OLD, Held, Piece, Stored
from twofold.train.saver import Saver, Snapshot

STATE = "state-00001-of-00001.safetensors"
FILES = ("config.json", "model.safetensors", STATE, "state.index.json", "trainer.json", "manifest.json")


class Files:
    """A model of one tensor."""

    def plan(self, dtype, whole, writers):
        return {
            "model.safetensors": [Pending(name="w", dtype=dtype, shape=(256,), values=lambda: whole("w"), source="w")]
        }

    def finish(self, directory: Path, dtype, files) -> None:
        (directory / "config.json").write_text('{"a": 1}')


def snapshot(step: int, value: torch.Tensor | None = None, **more) -> Snapshot:
    value = torch.full((3,), float(step)) if value is None else value
    return Snapshot(
        position=Position(step=step, **{"tokens": step * 10, **more}),
        weights={"w": Piece(Held.all((256,)), torch.arange(256.0), torch.float32)},
        states={"exp_avg.w": Piece(Held.all(value.shape), value, value.dtype)},
    )


def save(store: Checkpoints, step: int, **more) -> Path:
    Saver(store, Files(), Mesh(), behind=False).save(snapshot(step, **more))
    return store.path(step)


@pytest.fixture
def store(tmp_path: Path) -> Checkpoints:
    return Checkpoints(tmp_path / "checkpoints", keep_last=3)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def test_a_checkpoint_goes_round_and_the_oldest_go(store: Checkpoints) -> None:
    for step in (10, 20, 30, 40):
        save(store, step)
    assert store.steps() == [20, 30, 40]
    found, notes = store.latest()
    assert found == store.path(40) and notes == []
    assert read_position(found) == Position(step=40, tokens=400)
    assert torch.equal(Stored(found).read("exp_avg.w"), torch.full((3,), 40.0))
    assert sorted(p.name for p in found.iterdir()) == sorted(FILES)


def test_those_of_every_so_many_steps_stay(tmp_path: Path) -> None:
    store = Checkpoints(tmp_path, keep_last=2, keep_every=20)
    for step in (10, 20, 30, 40, 50, 60, 70):
        save(store, step)
    assert store.steps() == [20, 40, 60, 70]


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("harm", [truncate, flip, empty, Path.unlink])
def test_damage_is_named_and_the_one_before_is_used(store: Checkpoints, file: str, harm) -> None:
    for step in (1, 2, 3):
        save(store, step)
    harm(store.path(3) / file)
    found, notes = store.latest()
    assert found == store.path(2)
    assert len(notes) == 1 and "step-00000003 is damaged" in notes[0] and file in notes[0]
    assert (store.directory / "damaged-step-00000003").is_dir()
    assert store.latest() == (store.path(2), [])  # set aside, so told once
    save(store, 3)  # and its place is free
    assert store.latest()[0] == store.path(3)


def test_all_damaged_is_none_with_a_line_each(store: Checkpoints) -> None:
    for step in (1, 2):
        save(store, step)
        truncate(store.path(step) / "model.safetensors")
    found, notes = store.latest()
    assert found is None and len(notes) == 2


def test_a_manifest_that_was_edited_to_fit_is_found_by_its_own_hash(store: Checkpoints) -> None:
    path = save(store, 1)
    flip(path / "model.safetensors")
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"]["model.safetensors"]["sha256"] = checkpoint.digest(path / "model.safetensors")
    (path / "manifest.json").write_text(json.dumps(manifest))
    assert checkpoint.damage(path) == "manifest.json: its own SHA-256 does not match"


@pytest.mark.parametrize("calls", range(9))
def test_a_write_cut_short_anywhere_leaves_the_one_before(store: Checkpoints, monkeypatch, calls: int) -> None:
    save(store, 1)
    left = calls
    flush = checkpoint._flush

    def dying(path: Path) -> None:
        nonlocal left
        if left == 0:
            raise KeyboardInterrupt
        left -= 1
        flush(path)

    monkeypatch.setattr(checkpoint, "_flush", dying)
    try:
        save(store, 2)
        done = True
    except KeyboardInterrupt:
        done = False
    monkeypatch.undo()
    found, notes = Checkpoints(store.directory, 3).latest()
    assert notes == []  # a leftover is no damage
    assert found == store.path(2) if done or store.path(2).exists() else found == store.path(1)
    assert done == (calls > 5)
    assert not [p for p in store.directory.iterdir() if p.name.startswith(".")]
    save(store, 2)
    assert store.latest()[0] == store.path(2)


def test_saving_a_step_again_replaces_it(store: Checkpoints) -> None:
    save(store, 1)
    save(store, 1, tokens=99)
    assert read_position(store.path(1)).tokens == 99


def test_a_position_of_another_version_is_told(store: Checkpoints) -> None:
    path = save(store, 1)
    (path / "trainer.json").write_text('{"step": 1, "invented": 2}')
    with pytest.raises(CheckpointError, match="is not a position of this trainer"):
        read_position(path)


def test_a_directory_is_replaced_as_a_whole(tmp_path: Path) -> None:
    target = tmp_path / "model"
    replace_directory(target, lambda d: (d / "a").write_text("1"))

    def failing(directory: Path) -> None:
        (directory / "b").write_text("2")
        raise RuntimeError

    with pytest.raises(RuntimeError):
        replace_directory(target, failing)
    assert [p.name for p in target.iterdir()] == ["a"]
    replace_directory(target, lambda d: (d / "b").write_text("2"))
    assert [p.name for p in target.iterdir()] == ["b"]
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_what_one_process_wrote_before_there_were_pieces_is_read(tmp_path: Path) -> None:
    wanted = {"exp_avg.w": torch.randn(4, 3), "step.w": torch.tensor(7.0)}
    save_file(wanted, tmp_path / OLD)
    stored = Stored(tmp_path)
    assert stored.entries.keys() == wanted.keys() and stored.world == 1
    for name, tensor in wanted.items():
        assert torch.equal(stored.read(name), tensor)
    assert torch.equal(stored.read("exp_avg.w", Held.box((4, 3), ((1, 3), (0, 3)))), wanted["exp_avg.w"][1:3])


@pytest.fixture
def slow(monkeypatch) -> threading.Event:
    """Writes begin to end when this is set."""
    go = threading.Event()
    commit = Checkpoints.commit

    def waiting(self, *args):
        assert go.wait(30)
        return commit(self, *args)

    monkeypatch.setattr(Checkpoints, "commit", waiting)
    return go


def test_the_run_goes_on_while_a_copy_is_written(store: Checkpoints, slow: threading.Event) -> None:
    saver = Saver(store, Files(), Mesh())
    value = torch.zeros(3)
    for step in (1, 2):
        value.fill_(step)
        saver.save(snapshot(step, value))
    value.fill_(9)
    third = threading.Thread(target=saver.save, args=(snapshot(3, value),))
    third.start()
    third.join(0.3)
    assert third.is_alive(), "a third copy must wait for the first to be written"
    assert store.steps() == []
    slow.set()
    third.join(30)
    saver.wait()
    assert [Stored(store.path(step)).read("exp_avg.w")[0] for step in (1, 2, 3)] == [1, 2, 9]


def test_what_the_writer_meets_is_told_at_the_next_call(store: Checkpoints, monkeypatch) -> None:
    saver = Saver(store, Files(), Mesh())
    saver.save(snapshot(1))
    saver.wait()

    def full(directory: Path, dtype, files) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(saver.files, "finish", full)
    saver.save(snapshot(2))
    for thread in saver._threads:
        thread.join()
    assert saver.failed
    with pytest.raises(CheckpointError, match=r"checkpoint of step 2 could not be written: .*No space left on device"):
        saver.save(snapshot(3))
    with pytest.raises(CheckpointError, match="step 2"):
        saver.wait()
    assert store.latest() == (store.path(1), [])
