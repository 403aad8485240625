"""The library of CPU kernels: which instructions it is built for here, where it is, or why it is not there.

It is built when Twofold is installed (`python -m twofold.kernels.native`), into this package's own folder, and at first
use otherwise, into the user's cache: some seconds, once. Without a compiler everything runs on the references in torch.

`TWOFOLD_ISA` chooses avx512, avx2, portable, or none; or amx, which no machine takes by itself: it was compiled, and
tested with its instructions acted out, but has not run on a processor that has them.
"""

from __future__ import annotations

import ctypes
import logging
import os
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from ..core import ConfigError, unknown
from ..platforms import instruction_sets
from .build import BuildError, build
from .stages import Stage, Step

HERE = Path(__file__).parent / "cpu"
BUILT = HERE / "built"
AVX2 = ("avx2", "fma", "f16c")
AVX512 = (*AVX2, "avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni")
AMX = (*AVX512, "amx_tile", "amx_int8")
NEEDS: dict[str, tuple[str, ...]] = {"avx512": AVX512, "avx2": AVX2, "portable": (), "amx": AMX}
"""What the processor must have; the first that fits is taken."""
COST = "decoding is several times slower on the references in torch, and their bits differ from the kernels'"

log = logging.getLogger("twofold.kernels")


class Library:
    """The kernels, loaded: `run` gives a program of stages to the team of threads."""

    def __init__(self, path: Path, isa: str) -> None:
        self.path, self.isa = path, isa
        self._dll = ctypes.CDLL(str(path))
        self._run = self._dll.tf_run
        self._run.argtypes, self._run.restype = (ctypes.c_void_p, ctypes.c_int32, ctypes.c_int32), None
        self._kernels: dict[type[ctypes.Structure], int] = {}
        self._same_size(Step)

    def bind(self, program: Sequence[ctypes.Structure]) -> ctypes.Array[Stage]:
        """A program as the library takes it, for those that run one many times; `program` must stay alive."""
        return (Stage * len(program))(*(Stage(self._kernel(type(s)), ctypes.addressof(s)) for s in program))

    def run(self, program: Sequence[ctypes.Structure] | ctypes.Array[Stage], threads: int) -> None:
        """Run the stages one after another on `threads` threads; the interpreter's lock is released meanwhile."""
        bound = program if isinstance(program, ctypes.Array) else self.bind(program)
        self._run(ctypes.addressof(bound), len(bound), threads)

    def _kernel(self, kind: type[ctypes.Structure]) -> int:
        """The address of the kernel that takes this struct."""
        if kind not in self._kernels:
            self._same_size(kind)
            address = ctypes.cast(getattr(self._dll, f"tf_run_{kind.__name__}"), ctypes.c_void_p).value
            assert address is not None
            self._kernels[kind] = address
        return self._kernels[kind]

    def _same_size(self, kind: type[ctypes.Structure]) -> None:
        try:
            size = ctypes.c_int32.in_dll(self._dll, f"tf_size_{kind.__name__}").value
        except ValueError:
            raise BuildError(
                f"{self.path.name} has no kernel {kind.__name__}: delete it, and it is built anew"
            ) from None
        if size != ctypes.sizeof(kind):
            raise BuildError(f"{kind.__name__} is {ctypes.sizeof(kind)} bytes in stages.py, {size} in {self.path.name}")


def flags(isa: str) -> tuple[str, ...]:
    """The compiler's flags for an instruction set."""
    return tuple("-m" + name.replace("avx512_", "avx512").replace("_", "-") for name in NEEDS[isa])


def best() -> str:
    """The widest instruction set that this processor has, or the one that TWOFOLD_ISA names."""
    wanted = os.environ.get("TWOFOLD_ISA", "")
    if wanted:
        if wanted != "none" and wanted not in NEEDS:
            raise ConfigError(unknown("instruction set in TWOFOLD_ISA", wanted, [*NEEDS, "none"]))
        return wanted
    here = set(instruction_sets())
    return next(isa for isa, needs in NEEDS.items() if here.issuperset(needs))


def make(isa: str, extra: Sequence[str] = (), into: Path | None = None) -> Path:
    """Build the library for an instruction set, or find it built."""
    sources, headers = sorted(HERE.glob("*.cpp")), sorted(HERE.glob("*.h"))
    return build(f"twofold-{isa}", sources, (*flags(isa), *extra), headers=headers, into=into)


@cache
def state() -> tuple[Library | None, str]:
    """The library and "", or None and why it is not there, in one line."""
    isa = best()
    if isa == "none":
        return None, "TWOFOLD_ISA=none"
    if isa == "portable" and sys.platform != "linux" and os.name != "posix":
        return None, f"no kernels for {sys.platform}"
    try:
        into = BUILT if BUILT.is_dir() and os.access(BUILT, os.W_OK) else None
        return Library(make(isa, into=into), isa), ""
    except (BuildError, OSError) as error:
        log.warning("no CPU kernels: %s; %s", error, COST)
        return None, str(error)


def library() -> Library | None:
    """The kernels of this machine, built when they are not yet; None where they cannot be (see `state`)."""
    return state()[0]


def missing() -> str:
    """What this machine lacks to run the CPU kernels, "" when nothing."""
    return state()[1]


def main() -> int:
    """Build this machine's library into the package; the install step."""
    BUILT.mkdir(exist_ok=True)
    found, why = state()
    print(f"CPU kernels: {found.isa}, {found.path.name}" if found else f"no CPU kernels: {why}; {COST}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
