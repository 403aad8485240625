"""Checkpoints: whole or not there; what is damaged is named and the one before is used."""

import json
from pathlib import Path

import pytest
import torch

from twofold.core import CheckpointError
from twofold.train import checkpoint
from twofold.train.checkpoint import Checkpoints, Position, read_optimizer, read_position, replace_directory

FILES = ("config.json", "model.safetensors", "optimizer.safetensors", "trainer.json", "manifest.json")


def write_model(directory: Path) -> None:
    (directory / "config.json").write_text('{"a": 1}')
    (directory / "model.safetensors").write_bytes(bytes(range(256)) * 4)


def save(store: Checkpoints, step: int) -> Path:
    return store.save(Position(step=step, tokens=step * 10), {"exp_avg.w": torch.full((3,), float(step))}, write_model)


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
    assert torch.equal(read_optimizer(found)["exp_avg.w"], torch.full((3,), 40.0))
    assert sorted(p.name for p in found.iterdir()) == sorted(FILES)


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
    assert done == (calls > 6)
    assert not [p for p in store.directory.iterdir() if p.name.startswith(".")]
    save(store, 2)
    assert store.latest()[0] == store.path(2)


def test_saving_a_step_again_replaces_it(store: Checkpoints) -> None:
    save(store, 1)
    store.save(Position(step=1, tokens=99), {"x": torch.zeros(1)}, write_model)
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
