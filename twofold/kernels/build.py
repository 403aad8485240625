"""Build C++ sources into a shared library, once: the file's name holds the hash of everything that went into it.

    sources, headers, flags ──sha256──┐
    compiler's version ───────sha256──┴▶ <cache>/<name>-<hash>-<hash>.so    found: nothing to do
                                                                            not found: compile in parallel, link,
                                                                            rename into place

The cache is a folder of the user's own (TWOFOLD_CACHE, or the system's cache folder): what is loaded from it is run.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from ..core import ConfigError, TwofoldError, cache
from ..platforms import Compiler, find_compiler, usable_cores

FLAGS = (
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-pthread",
    "-fvisibility=hidden",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-Wall",
)
SECONDS = 300


@dataclass(frozen=True, kw_only=True, slots=True)
class Toolchain:
    """A compiler, and the flags that all its sources and its linking get."""

    compiler: Compiler
    flags: tuple[str, ...] = FLAGS
    link: tuple[str, ...] = ("-shared", "-pthread")


class BuildError(TwofoldError):
    """There is no compiler, or it refused; the message says which, in one line."""


def cache_folder() -> Path:
    """A folder that only this user can write to.

    Raises:
        BuildError: it belongs to somebody else, or others may write to it.
    """
    try:
        return cache.cache_folder("kernels")
    except ConfigError as error:
        raise BuildError(str(error)) from None


def build(
    name: str,
    sources: Sequence[Path],
    flags: Sequence[str] = (),
    *,
    headers: Sequence[Path] = (),
    into: Path | None = None,
    toolchain: Toolchain | None = None,
) -> Path:
    """The shared library made of `sources`, compiled in parallel when it is not there yet.

    Where there is no compiler, one that another compiler made of the same sources will do.

    Args:
        name: what the file's name begins with.
        flags: beside FLAGS, e.g. "-mavx2".
        headers: files that the sources include; they count in the hash.
        into: the folder to keep it in; the user's cache when not given.
        toolchain: what to build with; the C++ compiler of this machine when not given.

    Raises:
        BuildError: no compiler, or the compiler's first complaint.
    """
    what = hashlib.sha256(repr(tuple(flags)).encode())
    for file in sorted((*sources, *headers)):
        what.update(file.name.encode() + b"\0" + file.read_bytes())
    folder, named = into or cache_folder(), f"{name}-{what.hexdigest()[:20]}"
    if toolchain is None and find_compiler() is None:
        for built in sorted(folder.glob(f"{named}-*.so")):
            return built
    tools = toolchain or cpp_toolchain()
    by = hashlib.sha256(repr((tools.compiler.version, tools.flags)).encode())
    target = folder / f"{named}-{by.hexdigest()[:8]}.so"
    if not target.exists():
        with tempfile.TemporaryDirectory(dir=folder, prefix=".build-") as work:
            _compile(tools, sources, flags, Path(work), target)
    return target


def cpp_toolchain() -> Toolchain:
    """The C++ compiler of this machine. Raises BuildError when there is none."""
    compiler = find_compiler()
    if compiler is None:
        raise BuildError("no C++ compiler was found: install g++ or clang++, or set CXX")
    return Toolchain(compiler=compiler)


def keep_source(name: str, text: str, suffix: str) -> Path:
    """Source text as a file of the cache, named by its content, so that a compiler can read it."""
    folder = cache_folder()
    place = folder / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:20]}{suffix}"
    if not place.exists():
        with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=folder, prefix=".source-", delete=False) as file:
            file.write(text)
        os.replace(file.name, place)
    return place


def _compile(tools: Toolchain, sources: Sequence[Path], flags: Sequence[str], work: Path, target: Path) -> None:
    def one(source: Path) -> Path:
        made = work / f"{source.stem}.o"
        _run([tools.compiler.path, *tools.flags, *flags, "-c", str(source), "-o", str(made)])
        return made

    with ThreadPoolExecutor(max(1, usable_cores())) as pool:
        objects = list(pool.map(one, sources))
    linked = work / target.name
    _run([tools.compiler.path, *tools.link, *flags, *map(str, objects), "-o", str(linked)])
    os.replace(linked, target)


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=SECONDS, env=os.environ | {"LC_ALL": "C"}
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{command[0]} could not be run: {error}") from error
    if done.returncode:
        lines = done.stderr.splitlines() or ["no word"]
        first = next((line for line in lines if "error" in line), lines[0])
        raise BuildError(f"{Path(command[0]).name} refused: {first[:300]}")
