"""Where activations wait: storages once, views as they were, room taken anew, and nothing left behind."""

from __future__ import annotations

import errno
import gc
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_recompute import fresh, gradients, same, spec_of

from twofold.core import CapacityError
from twofold.train import kept
from twofold.train.recompute import recompute_layers


def views() -> list[torch.Tensor]:
    base = torch.randn(64, 48)
    return [
        base,
        base[3:9],
        base[:, 7:20],
        base.t(),
        base.view(-1)[5:77:3],
        base[:0],
        torch.arange(2000),
        base.bfloat16(),
    ]


class Moving(kept.Host):
    """Host memory, for tensors that are there already."""

    def stays(self, tensor: torch.Tensor) -> bool:
        return kept.Away.stays(self, tensor)


@pytest.mark.parametrize("make", [kept.OnDevice, kept.Host, Moving, kept.Disk])
def test_tensors_come_back_as_they_were(make) -> None:
    keeper, tensors = make(), views()
    held = [keeper.keep(tensor) for tensor in tensors]
    for tensor, packed in zip(tensors, held):
        back = keeper.fetch(packed)
        assert torch.equal(back, tensor) and back.stride() == tensor.stride() and back.dtype == tensor.dtype


def test_a_storage_moves_once_and_comes_back_once() -> None:
    disk, (base, rows, columns, *_) = kept.Disk(), views()
    held = [disk.keep(tensor) for tensor in (base, rows, columns)]
    assert disk.live == 1
    back = [disk.fetch(packed) for packed in held]
    assert len({tensor.untyped_storage().data_ptr() for tensor in back}) == 1
    again = disk.keep(base)
    assert disk.live == 1 and again.stored is held[0].stored
    del held, again
    assert disk.live == 0
    assert torch.equal(back[1], rows)  # a copy, whatever is written next


def test_a_new_tensor_in_an_old_ones_place_is_another() -> None:
    disk, held, expected = kept.Disk(), [], []
    for number in range(50):
        tensor = torch.full((40, 40), float(number))
        held.append(disk.keep(tensor))
        expected.append(number)
        del tensor
    assert disk.live == 50
    assert [float(disk.fetch(packed)[7, 7]) for packed in held] == expected


def test_room_is_taken_anew_in_whatever_order_it_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept, "SEGMENT", 1 << 16)
    disk, held, most, source = kept.Disk(), [], 0, random.Random(3)
    for number in range(600):
        if len(held) > 12 or (held and source.random() < 0.45):
            value, packed = held.pop(source.randrange(len(held)))
            assert float(disk.fetch(packed).mean()) == value
            del packed
        else:
            tensor = torch.full((source.choice((2000, 5000, 40000)),), float(number))
            held.append((float(number), disk.keep(tensor)))
        most = max(most, len(held))
    assert disk.live == len(held)
    assert disk.size <= 4 * most * 40000 * 4
    held.clear()
    size = disk.size
    disk.keep(torch.zeros(40000))
    assert disk.size == size


def test_a_full_disk_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(
        CapacityError, match=r"64 MiB more on disk beside 0: No space left.*run\.output on a larger disk"
    ):
        kept.Disk().keep(torch.zeros(5000))


def test_a_run_that_is_killed_leaves_no_file(tmp_path: Path) -> None:
    program = (
        "import os, sys, signal, torch; from pathlib import Path; from twofold.train.kept import Disk\n"
        "disk = Disk(Path(sys.argv[1])); held = disk.keep(torch.ones(1 << 20)); assert disk.size >= 4 << 20\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], env=os.environ | {"PYTHONPATH": os.getcwd()})
    assert done.returncode == -signal.SIGKILL and not list(tmp_path.iterdir())


@pytest.mark.parametrize("policy", ["none", "selective", "full"])
def test_gradients_from_host_memory(policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept, "SMALLEST", 0)
    spec = spec_of("qwen2-moe")
    decoder = fresh(spec)
    recompute_layers(decoder, policy, keeper=Moving())
    same(gradients(decoder), gradients(fresh(spec)))
    gc.collect()
