"""Each wall around a candidate by itself, in a process of its own: it stands or says that it does not."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

import pytest

from twofold.align.rewards.court import seccomp

PRELUDE = """
import ctypes, os, socket, sys, threading
from twofold.align.rewards.court import landlock, seccomp, walls
libc = ctypes.CDLL(None, use_errno=True)
def refused(act):
    try:
        act()
    except PermissionError:
        return True
    return False
"""


def said(code: str, tmp_path: Path) -> list[str]:
    """The words that a fresh process prints."""
    words = [sys.executable, "-c", PRELUDE + code, str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=30, env={"PYTHONPATH": ":".join(sys.path)})
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_seccomp_alone(tmp_path: Path) -> None:
    code = """
stands = libc.prctl(38, 1, 0, 0, 0) == 0 and seccomp.install(libc)
acts = [socket.socket, os.fork, lambda: os.kill(os.getpid(), 0), os.setsid, lambda: os.execv("/bin/true", ["true"])]
thread = threading.Thread(target=lambda: print("thread"))
thread.start(); thread.join()
print(stands, *[refused(act) for act in acts])
"""
    thread, stands, *refused = said(code, tmp_path)
    assert thread == "thread"
    listed = sys.platform.startswith("linux") and platform.machine() in ("x86_64", "aarch64")
    assert (stands == "True") == listed
    assert stands == "False" or refused == ["True"] * 5


def test_landlock_alone(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "out").write_text("secret")
    code = """
folder = sys.argv[1]
libc.prctl(38, 1, 0, 0, 0)
stands = landlock.restrict(libc, folder + "/in")
print(stands)
open(folder + "/in/mine", "w").write("x")
import decimal
acts = [lambda: open(folder + "/out"), lambda: open(folder + "/out", "w"), lambda: os.unlink(folder + "/out"),
        lambda: os.listdir("/"), lambda: open("/proc/self/status"), lambda: os.mkdir(folder + "/new")]
print(*[refused(act) for act in acts])
"""
    stands, *refused = said(code, tmp_path)
    assert (tmp_path / "in" / "mine").read_text() == "x"
    assert stands == "False" or (refused == ["True"] * 6 and (tmp_path / "out").read_text() == "secret")


def test_all_walls_say_which_stand(tmp_path: Path) -> None:
    code = """
stand = walls.wall_in(walls.Limits(2.0, 512, sys.argv[1]))
open("mine", "w").write("x")
print(*stand)
"""
    stand = said(code, tmp_path)
    assert set(stand) <= set(walls_of_the_machine())
    if "namespaces" in stand:
        assert not (tmp_path / "mine").exists()  # its folder is its own


def walls_of_the_machine() -> tuple[str, ...]:
    from twofold.align.rewards.court.walls import WALLS

    return WALLS


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_the_filter_is_one_that_a_kernel_takes(machine: str) -> None:
    """At most 4,096 instructions, jumps of one byte, every path ends in a verdict."""
    import struct

    code = seccomp.program(machine)
    assert code is not None and len(code) % 8 == 0 and len(code) // 8 < 4096
    lines = [struct.unpack_from("=HBBI", code, at) for at in range(0, len(code), 8)]
    for place, (kind, yes, no, _) in enumerate(lines):
        assert place + 1 + max(yes, no) < len(lines) or kind == 0x06
    assert lines[-1][0] == 0x06
    assert seccomp.program("riscv64") is None


@pytest.mark.parametrize(("machine", "arch"), [("x86_64", 0xC000003E), ("aarch64", 0xC00000B7)])
def test_the_filter_decides_call_by_call(machine: str, arch: int) -> None:
    """The program is walked here as the kernel would walk it."""
    column = {"x86_64": 0, "aarch64": 1}[machine]
    allow, eperm, enosys, kill = 0x7FFF0000, 0x00050001, 0x00050026, 0x80000000

    def verdict(number: int, first: int = 0, second: int = 0, of: int = arch) -> int:
        return walk(seccomp.program(machine) or b"", {0: number, 4: of, 16: first, 24: second})

    clone, prlimit, fcntl = (56, 220)[column], (302, 261)[column], (72, 25)[column]
    read, kills = (0, 63)[column], (62, 129)[column]
    assert verdict(read) == allow and verdict(kills) == eperm
    assert verdict(clone, 0x10F00) == allow and verdict(clone, 17) == eperm and verdict(435) == enosys
    assert verdict(prlimit, 0) == allow and verdict(prlimit, 1) == eperm
    assert verdict(fcntl, 3, 1) == allow and verdict(fcntl, 3, 8) == eperm and verdict(fcntl, 3, 15) == eperm
    assert verdict(read | 0x40000000) == eperm and verdict(read, of=0x40000003) == kill


def walk(code: bytes, data: dict[int, int]) -> int:
    import struct

    lines = [struct.unpack_from("=HBBI", code, at) for at in range(0, len(code), 8)]
    place = held = 0
    while True:
        kind, yes, no, value = lines[place]
        place += 1
        if kind == 0x20:
            held = data[value]
        elif kind == 0x06:
            return int(value)
        else:
            true = {0x15: held == value, 0x35: held >= value, 0x45: bool(held & value)}[kind]
            place += yes if true else no
