"""The control groups this process lives in: where a container's limits are written.

A limit may stand on any directory from the process's own up to the root, so all of them are visited:

    version 2   /proc/self/cgroup "0::/a/b"          /sys/fs/cgroup/a/b, .../a, /sys/fs/cgroup
    version 1   /proc/self/cgroup "4:memory:/a/b"    /sys/fs/cgroup/memory/a/b, .../a, /sys/fs/cgroup/memory

Inside a container the path of the line is often the host's and does not exist here; the parents that do exist count.
"""

from __future__ import annotations

from pathlib import Path

PROC = Path("/proc")
CGROUPS = Path("/sys/fs/cgroup")


def directories(controller: str, proc: Path = PROC, cgroups: Path = CGROUPS) -> list[tuple[Path, int]]:
    """Existing directories that may limit this process for `controller`, innermost first, each with its version."""
    found: list[tuple[Path, int]] = []
    for line in _lines(proc / "self" / "cgroup"):
        number, names, path = line.split(":", 2)
        if number == "0" and not names:
            roots = [(cgroups, 2), (cgroups / "unified", 2)]
        elif controller in names.split(","):
            roots = [(cgroups / controller, 1), (cgroups / names, 1)]
        else:
            continue
        for root, version in roots:
            inner = root / path.strip("/")
            for place in (inner, *inner.parents):
                if not place.is_relative_to(root):
                    break
                if place.is_dir() and (place, version) not in found:
                    found.append((place, version))
    return found


def number(path: Path) -> int | None:
    """The whole number that a control file holds; None when it is absent, says "max", or means no limit."""
    for text in _lines(path):
        word = text.split()[0] if text.split() else ""
        if word.lstrip("-").isdigit():
            value = int(word)
            return value if 0 <= value < 2**60 else None  # version 1 writes "no limit" as nearly 2**63
    return None


def field(path: Path, name: str) -> int:
    """The number after `name` in a file of "name number" lines, 0 when it is not there."""
    for line in _lines(path):
        words = line.replace(":", " ").split()
        if len(words) >= 2 and words[0] == name:
            return int(words[1])
    return 0


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
