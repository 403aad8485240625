"""Safetensors files: what we write the reference library reads, and what is damaged is refused by name."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from twofold.core.errors import CheckpointError
from twofold.models.shards import Pending, Shard, write_shard


def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {
        "a": torch.randn(3, 5),
        "b": torch.randn(7).to(torch.bfloat16),
        "c": torch.randn(2, 2, 3).to(torch.float16),
        "empty": torch.empty(0, 4),
        "scalar": torch.tensor(3.5),
    }


def raw(path: Path, header: Any, data: bytes) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def test_read_what_the_library_wrote(tmp_path: Path) -> None:
    save_file(tensors(), tmp_path / "x.safetensors")
    shard = Shard(tmp_path / "x.safetensors")
    assert {name: entry.shape for name, entry in shard.entries.items()} == {
        name: tuple(tensor.shape) for name, tensor in tensors().items()
    }
    for name, tensor in tensors().items():
        assert torch.equal(shard.tensor(name), tensor)
        shard.release(name)
        assert torch.equal(shard.tensor(name), tensor)


def test_read_straight_into_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In pieces smaller than a tensor, from offsets that no dtype is aligned to."""
    monkeypatch.setattr("twofold.models.shards.PIECE", 7)
    save_file(tensors(), tmp_path / "x.safetensors")
    text = (tmp_path / "x.safetensors").read_bytes()
    length = int.from_bytes(text[:8], "little")
    raw(tmp_path / "y.safetensors", text[8 : 8 + length] + b" ", text[8 + length :])
    for name in ("x.safetensors", "y.safetensors"):
        places = {name: torch.full_like(tensor, 9) for name, tensor in tensors().items()}
        Shard(tmp_path / name).read_into(places)
        assert all(torch.equal(places[name], tensor) for name, tensor in tensors().items())


def test_a_file_that_shrinks_while_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file(tensors(), path)
    shard = Shard(path)
    os.truncate(path, path.stat().st_size - 4)
    with pytest.raises(CheckpointError, match=r"x\.safetensors ended at byte \d+"):
        shard.read_into({name: torch.empty_like(tensor) for name, tensor in tensors().items()})


def test_the_library_reads_what_we_wrote(tmp_path: Path) -> None:
    pending = [
        Pending(name=name, dtype=tensor.dtype, shape=tuple(tensor.shape), values=lambda tensor=tensor: tensor)
        for name, tensor in tensors().items()
    ]
    write_shard(tmp_path / "x.safetensors", pending)
    back = load_file(tmp_path / "x.safetensors")
    assert back.keys() == tensors().keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in tensors().items())
    assert [file.name for file in tmp_path.iterdir()] == ["x.safetensors"]


def test_a_tensor_at_an_odd_offset(tmp_path: Path) -> None:
    value = torch.randn(3)
    header = {"x": {"dtype": "F32", "shape": [3], "data_offsets": [0, 12]}}
    path = raw(tmp_path / "x.safetensors", json.dumps(header).encode() + b" " * 3, value.numpy().tobytes())
    shard = Shard(path)
    assert shard.entries["x"].begin % 4 != 0
    assert torch.equal(shard.tensor("x"), value)


@pytest.mark.parametrize("keep", [0, 4, 8, 40, 200, -1])
def test_a_truncated_file(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "x.safetensors"
    save_file(tensors(), path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"x\.safetensors is damaged"):
        Shard(path)


X = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("header", "size"),
    [
        ({"x": X}, 12),
        ({"x": X | {"shape": [3]}}, 8),
        ({"x": X | {"shape": [-2]}}, 8),
        ({"x": X | {"shape": [2.0]}}, 8),
        ({"x": X | {"dtype": "F33"}}, 8),
        ({"x": {"dtype": "F32", "shape": [2]}}, 8),
        ({"x": X | {"data_offsets": [8, 16]}}, 16),
        ({"x": X, "y": X}, 8),
        ({"x": X, "y": X | {"data_offsets": [4, 12]}}, 12),
        ([1, 2], 8),
        (b"{", 8),
        (b'{"x": 1, "x": 2}', 8),
        (b"[" * 100_000, 8),
    ],
)
def test_a_header_that_lies(tmp_path: Path, header: Any, size: int) -> None:
    path = raw(tmp_path / "x.safetensors", header, b"\0" * size)
    with pytest.raises(CheckpointError, match=r"x\.safetensors is damaged"):
        Shard(path)


def test_a_header_longer_than_the_file(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes((1 << 60).to_bytes(8, "little") + b"{}")
    with pytest.raises(CheckpointError, match="is damaged"):
        Shard(path)


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be read"):
        Shard(tmp_path / "x.safetensors")
