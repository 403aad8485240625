"""HostPool: what goes in comes out, what is let go is not resident, nothing is left behind, errors say what to do."""

from __future__ import annotations

import os
import platform
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from twofold.core import CapacityError, ConfigError
from twofold.platforms.host import HostPool

F32, BF16 = torch.float32, torch.bfloat16
MIB = 1 << 20


def resident() -> int:
    """Bytes of files that this process has mapped in memory."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("RssFile"))


@pytest.mark.parametrize("kind", ["host", "disk"])
def test_what_goes_in_comes_out(kind, tmp_path: Path) -> None:
    with HostPool(kind, tmp_path) as pool:
        first = pool.allocate({"a": ((3, 5), F32), "none": ((0, 4), F32), "one": ((), BF16)})
        more = pool.allocate({"b": ((70_000,), BF16)})
        assert not any(x.count_nonzero() for x in (*first.values(), *more.values()))
        assert first["none"].shape == (0, 4) and first["one"].shape == ()
        truth = {name: torch.randn(x.shape).to(x.dtype) for name, x in (first | more).items()}
        for name, x in truth.items():
            pool[name].copy_(x)
        pool.let_go(*pool.tensors.values())
        pool.drop()
        pool.bring(*pool.tensors.values(), write=True).result()
        assert all(torch.equal(pool[name], x) for name, x in truth.items())
        assert pool.holds(pool["a"].view(-1)[4:]) == (kind == "disk")
        assert not pool.holds(torch.zeros(3))
        held = pool["b"]
    assert torch.equal(held, truth["b"]), "a tensor that is held outlives its pool"
    assert not pool.tensors and not pool.nbytes


def test_nothing_is_seen_in_the_directory_even_of_a_killed_process(tmp_path: Path) -> None:
    program = """
import sys, torch
from twofold.platforms.host import HostPool
pool = HostPool("disk", sys.argv[1])
pool.allocate({"a": ((1 << 20,), torch.float32)})["a"].fill_(1)
print("ready", flush=True)
sys.stdin.read()
"""
    child = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    assert child.stdout and child.stdin
    assert child.stdout.readline() == b"ready\n"
    files = [os.readlink(link) for link in Path(f"/proc/{child.pid}/fd").iterdir()]
    assert any(name.startswith(str(tmp_path)) for name in files), "it does hold a file there"
    assert not list(tmp_path.iterdir())
    child.kill()
    child.communicate()
    assert child.returncode == -signal.SIGKILL
    assert not list(tmp_path.iterdir())


def test_only_what_is_in_use_is_resident(tmp_path: Path) -> None:
    with HostPool("disk", tmp_path) as pool:
        before = resident()
        x = pool.allocate({"a": ((16 * MIB,), F32)})["a"]  # 64 MiB
        assert resident() - before < 4 * MIB, "room that is reserved is not resident"
        x.fill_(3.0)
        assert resident() - before > 60 * MIB
        pool.let_go(x)
        assert resident() - before < 4 * MIB
        part = x[4 * MIB : 8 * MIB]
        pool.bring(part).result()
        if tuple(map(int, platform.release().split(".")[:2])) >= (5, 14):
            assert 14 * MIB < resident() - before < 20 * MIB, "sixteen were brought"
        assert float(part.sum()) == 3.0 * 4 * MIB
        pool.let_go(part)
        assert resident() - before < 4 * MIB


def test_parts_are_let_go_without_a_loss_at_their_borders(tmp_path: Path) -> None:
    with HostPool("disk", tmp_path) as pool:
        x = pool.allocate({"a": ((10_000,), F32)})["a"]
        x.copy_(torch.arange(10_000.0))
        pool.let_go(x[1:5_001])
        x[5_000:5_003] += 1
        pool.let_go(x[5_001:9_999])
        expected = torch.arange(10_000.0)
        expected[5_000:5_003] += 1
        assert torch.equal(x, expected)


def test_a_full_disk_is_told_before_anything_is_written(tmp_path: Path) -> None:
    with HostPool("disk", tmp_path) as pool:
        disk = os.statvfs(tmp_path)
        free = disk.f_bavail * disk.f_frsize
        with pytest.raises(CapacityError, match=r"no room for a file of .* GiB, .* are free: make room there, or name"):
            pool.allocate({"big": ((2 * free,), torch.uint8)})
        assert pool.allocate({"small": ((4,), F32)})["small"].sum() == 0, "the pool goes on"


def test_a_limit_on_the_size_of_files_is_told(tmp_path: Path) -> None:
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    with HostPool("disk", tmp_path) as pool:
        resource.setrlimit(resource.RLIMIT_FSIZE, (MIB, old[1]))
        try:
            with pytest.raises(CapacityError, match="may not write files so large; raise its limit"):
                pool.allocate({"big": ((MIB,), F32)})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, old)
        assert pool.allocate({"big": ((MIB,), F32)})["big"].sum() == 0


def test_a_directory_that_is_not_one_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="needs a directory"):
        HostPool("disk")
    with pytest.raises(ConfigError, match="is not a directory"):
        HostPool("disk", tmp_path / "nowhere")


def test_a_name_is_given_once(tmp_path: Path) -> None:
    with HostPool() as pool:
        pool.allocate({"a": ((1,), F32)})
        with pytest.raises(ConfigError, match="'a' is in this pool already"):
            pool.allocate({"b": ((1,), F32), "a": ((1,), F32)})
        assert "b" not in pool.tensors
