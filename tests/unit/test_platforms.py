"""Limits are read where containers write them: made-up /proc and cgroup trees of both versions."""

from pathlib import Path

import pytest

from twofold.kernels import native
from twofold.platforms import (
    bound_spin,
    bound_team,
    current,
    find_compiler,
    instruction_sets,
    read_memory,
    usable_cores,
)

GIB = 2**30


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    """16 GiB in all, 12 GiB free, no control groups."""
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "cg").mkdir()
    write(tmp_path / "proc/meminfo", f"MemTotal: {16 * 2**20} kB\nMemFree: 1 kB\nMemAvailable: {12 * 2**20} kB\n")
    write(tmp_path / "proc/self/cgroup", "")
    return tmp_path


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_without_groups_the_machine_is_the_limit(machine: Path) -> None:
    memory = read_memory(machine / "proc", machine / "cg")
    assert (memory.total, memory.available, memory.limit) == (16 * GIB, 12 * GIB, "machine")


def test_version_2_limit_of_a_parent_counts(machine: Path) -> None:
    write(machine / "proc/self/cgroup", "0::/pod/box\n")
    write(machine / "cg/pod/memory.max", f"{4 * GIB}\n")
    write(machine / "cg/pod/memory.current", f"{3 * GIB}\n")
    write(machine / "cg/pod/memory.stat", f"anon 5\ninactive_file {GIB}\n")
    write(machine / "cg/pod/box/memory.max", "max\n")
    memory = read_memory(machine / "proc", machine / "cg")
    assert (memory.total, memory.available) == (4 * GIB, 2 * GIB)  # 3 used, 1 of it page cache
    assert memory.limit.endswith("/pod")


def test_version_1_limit_counts_and_no_limit_does_not(machine: Path) -> None:
    write(machine / "proc/self/cgroup", "4:memory:/box\n1:cpu,cpuacct:/box\n")
    write(machine / "cg/memory/memory.limit_in_bytes", "9223372036854771712\n")
    write(machine / "cg/memory/box/memory.limit_in_bytes", f"{2 * GIB}\n")
    write(machine / "cg/memory/box/memory.usage_in_bytes", f"{GIB}\n")
    write(machine / "cg/memory/box/memory.stat", f"cache 7\ntotal_inactive_file {GIB // 2}\n")
    memory = read_memory(machine / "proc", machine / "cg")
    assert (memory.total, memory.available) == (2 * GIB, GIB + GIB // 2)


def test_a_path_of_the_host_falls_back_to_the_root_of_the_mount(machine: Path) -> None:
    write(machine / "proc/self/cgroup", "0::/not/mounted/here\n")
    write(machine / "cg/memory.max", f"{GIB}\n")
    assert read_memory(machine / "proc", machine / "cg").total == GIB


@pytest.mark.parametrize(
    ("groups", "file", "text"),
    [("0::/box\n", "cg/box/cpu.max", "50000 100000\n"), ("2:cpu:/box\n", "cg/cpu/box/cpu.cfs_quota_us", "50000\n")],
)
def test_half_a_processor_is_one_thread(machine: Path, groups: str, file: str, text: str) -> None:
    write(machine / "proc/self/cgroup", groups)
    write(machine / file, text)
    write((machine / file).with_name("cpu.cfs_period_us"), "100000\n")
    assert usable_cores(machine / "proc", machine / "cg") == 1


def test_no_quota_leaves_the_affinity_mask(machine: Path) -> None:
    import os

    write(machine / "proc/self/cgroup", "0::/\n")
    write(machine / "cg/cpu.max", "max 100000\n")
    assert usable_cores(machine / "proc", machine / "cg") == len(os.sched_getaffinity(0))


def test_instruction_sets_are_read_from_the_flags(tmp_path: Path) -> None:
    write(tmp_path / "cpuinfo", "processor : 0\nmodel name : A\nflags : fpu sse avx2 fma avx512_vnni nonsense\n")
    assert instruction_sets(tmp_path) == ("avx2", "fma", "avx512_vnni")
    assert instruction_sets(tmp_path / "absent") == ()


@pytest.mark.parametrize("isa", list(native.NEEDS))
def test_every_instruction_that_kernels_need_is_looked_for(isa: str, tmp_path: Path) -> None:
    write(tmp_path / "cpuinfo", f"flags : fpu {' '.join(native.NEEDS[isa])}\n")
    assert set(instruction_sets(tmp_path)) == set(native.NEEDS[isa])


def test_compiler_is_found_by_cxx_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = tmp_path / "fake++"
    write(fake, "#!/bin/sh\necho fake 1.2\n")
    fake.chmod(0o755)
    monkeypatch.setenv("CXX", str(fake))
    found = find_compiler()
    assert found is not None
    assert (found.path, found.version) == (str(fake), "fake 1.2")


def test_no_compiler_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_compiler() is None


def test_current_says_what_this_process_may_use() -> None:
    platform = current()
    assert platform.device == "cpu"
    assert platform.cores >= 1
    assert 0 < platform.memory.available <= platform.memory.total


def test_a_team_leaves_a_core_to_others_unless_the_user_says_so() -> None:
    for cores, team in ((1, "1"), (2, "2"), (3, "2"), (64, "63")):
        free = dict[str, str]()
        bound_team(free, cores)
        assert free == {"OMP_NUM_THREADS": team}
    chosen = {"OMP_NUM_THREADS": "8"}
    bound_team(chosen, 2)
    assert chosen == {"OMP_NUM_THREADS": "8"}


def test_the_spin_is_bounded_unless_the_user_says_how_to_wait() -> None:
    free, chosen = dict[str, str](), {"OMP_WAIT_POLICY": "ACTIVE"}
    bound_spin(free)
    bound_spin(chosen)
    assert int(free["GOMP_SPINCOUNT"]) > 0
    assert chosen == {"OMP_WAIT_POLICY": "ACTIVE"}
