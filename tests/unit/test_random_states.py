"""Random states in a checkpoint: the processor's, and the GPU's where the process has one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from twofold.parallel import Mesh, ParallelConfig
from twofold.parallel.layout import lay_out
from twofold.train import state
from twofold.train.checkpoint import Position


class Kept:
    """Checkpointed tensors by name, as one process left them."""

    world = 1

    def __init__(self, entries: dict[str, Tensor]) -> None:
        self.entries, self.read = entries, entries.__getitem__


@pytest.fixture
def mesh() -> Mesh:
    return Mesh(lay_out(ParallelConfig(), 1), 0)


def test_a_gpus_state_is_put_back_with_the_processors(mesh: Mesh, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = [torch.tensor([1, 2, 3], dtype=torch.uint8)]
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda: gpu[-1])
    monkeypatch.setattr(torch.cuda, "set_rng_state", gpu.append)
    torch.manual_seed(5)
    kept = state.random_pieces(mesh)
    assert set(kept) == {"rng.0", "rng.0.cuda"}
    wanted = torch.rand(3)
    stored = Kept({name: piece.tensor.clone() for name, piece in kept.items()})
    gpu.append(torch.zeros(3, dtype=torch.uint8))
    state.put_random_back(stored, Position(), mesh)
    assert torch.equal(torch.rand(3), wanted) and torch.equal(gpu[-1], gpu[0])


def test_without_a_gpu_there_is_one_state_and_anothers_is_left_alone(mesh: Mesh) -> None:
    torch.manual_seed(6)
    kept = state.random_pieces(mesh)
    assert set(kept) == {"rng.0"}
    wanted = torch.rand(3)
    stored = Kept({name: piece.tensor.clone() for name, piece in kept.items()} | {"rng.0.cuda": torch.zeros(16)})
    state.put_random_back(stored, Position(), mesh)
    assert torch.equal(torch.rand(3), wanted)
