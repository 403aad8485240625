"""Compiled: a kernel given as C++ or CUDA source, built at first use and called with checked pointers.

source + glue for each entry ──compiler──▶ shared library ──ctypes──▶ twofold_<symbol>(pointers, sizes, numbers)
"""

from __future__ import annotations

import contextlib
import ctypes
import platform
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core import ConfigError, unknown
from ..platforms import Compiler, instruction_sets
from . import build, native
from .entry import MISMATCH, Entry, Float, Int, Make
from .op import Op

_PREAMBLE = '#include <cstdint>\n#include <type_traits>\n#line 1 "{name}"\n'
_CUDA_FLAGS = ("-std=c++17", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden")


class Compiled:
    """The functions of a source that serve an op: a forward, and a backward where there is one.

    Raises:
        ConfigError: an entry names what the reference has not, or leaves out what it has, or is not in the source.
    """

    def __init__(
        self,
        op: Op[..., Any],
        source: str,
        forward: Entry,
        backward: Entry | None,
        *,
        dtype: torch.dtype,
        device: str,
        fixed: Sequence[str] = (),
        instructions: tuple[str, ...] = (),
        flags: tuple[str, ...] = (),
    ) -> None:
        self.name, self.names = op.name, op.reader.names
        self.source, self.entries = source, {"forward": forward} | ({"backward": backward} if backward else {})
        self.dtype, self.device, self.instructions, self.flags = dtype, device, instructions, flags
        self.make: Make = lambda shape, dtype, device: torch.empty(shape, dtype=dtype, device=device)
        self._calls: dict[str, Callable[..., None]] = {}
        _check_forward(op, forward, fixed)
        if backward is not None:
            _check_backward(op, forward, backward)
        for entry in self.entries.values():
            if entry.symbol not in source:
                raise ConfigError(f"{op.name}: the source has no function '{entry.symbol}'")

    def prepare(self) -> str:
        """Build and load the library; what is lacking, "" when it is there.

        Raises:
            ConfigError: the source's functions have other parameters than the entries declare.
        """
        lacking = self._machine_lacks()
        if lacking:
            return lacking
        try:
            library = ctypes.CDLL(str(self._build()))
        except (build.BuildError, OSError) as error:
            if MISMATCH in str(error):
                raise ConfigError(f"{self.name}: {error}") from None
            return str(error)
        self._calls = {kind: entry.bind(library, self.device == "cuda") for kind, entry in self.entries.items()}
        return ""

    def forward(self, args: tuple[Any, ...]) -> tuple[Tensor, ...]:
        return self._call("forward", dict(zip(self.names, args, strict=True)))

    def backward(
        self, args: tuple[Any, ...], outs: tuple[Tensor, ...], grads: tuple[Tensor, ...], wanted: Sequence[str]
    ) -> Mapping[str, Tensor | None] | None:
        """The gradients of the inputs by name, or None when the kernel does not make all that are wanted."""
        entry = self.entries.get("backward")
        if entry is None:
            return None
        made = [out.name.removeprefix("grad_") for out in entry.outs]
        if not set(wanted) <= set(made):
            return None
        given = dict(zip(self.names, args, strict=True))
        for out, value, grad in zip(self.entries["forward"].outs, outs, grads, strict=True):
            given |= {out.name: value, f"grad_{out.name}": grad}
        return dict(zip(made, self._call("backward", given), strict=True))

    @contextlib.contextmanager
    def made_by(self, make: Make) -> Iterator[None]:
        """Let outputs be made by `make` for a while, as a check does that watches their borders."""
        usual, self.make = self.make, make
        try:
            yield
        finally:
            self.make = usual

    def _call(self, kind: str, given: Mapping[str, Any]) -> tuple[Tensor, ...]:
        passed, outs, kept = self.entries[kind].arguments(given, self.dtype, self.device, self.make)
        if self.device == "cpu":
            self._calls[kind](*passed)
            return outs
        with torch.cuda.device(kept[0].device):
            stream = torch.cuda.current_stream()
            self._calls[kind](*passed, stream.cuda_stream)
            for tensor in kept:  # copies made for this call alone must live until the stream has read them
                tensor.record_stream(stream)
        return outs

    def _machine_lacks(self) -> str:
        if self.device == "cuda":
            if not torch.cuda.is_available():
                return "no CUDA device"
            return "" if shutil.which("nvcc") else "no nvcc, which comes with the CUDA toolkit"
        here = instruction_sets()
        absent = [name for name in self.instructions if name not in here]
        return f"this processor has no {', '.join(absent)}" if absent else ""

    def _build(self) -> Path:
        if self.device == "cuda":
            major, minor = torch.cuda.get_device_capability()
            return self.compile_cuda(f"sm_{major}{minor}")
        isa = native.best()
        flags = native.flags(isa) if isa in native.NEEDS else ()
        if platform.machine() in ("x86_64", "AMD64"):
            flags += tuple("-m" + name.replace("_", "") for name in self.instructions)
        return build.build(self.name, [self._text(".cpp")], (*flags, *self.flags))

    def compile_cuda(self, architecture: str) -> Path:
        """The library for a device of this architecture, such as sm_90. Raises BuildError."""
        tools = build.Toolchain(compiler=_nvcc(), flags=_CUDA_FLAGS, link=("-shared",))
        flags = (f"-arch={architecture}", *self.flags)
        return build.build(self.name, [self._text(".cu")], flags, toolchain=tools)

    def _text(self, suffix: str) -> Path:
        glue = [entry.glue(self.dtype, self.device == "cuda") for entry in self.entries.values()]
        text = _PREAMBLE.format(name=self.name + suffix) + self.source + "".join(glue)
        return build.keep_source(self.name, text, suffix)


def _nvcc() -> Compiler:
    path = shutil.which("nvcc")
    if path is None:
        raise build.BuildError("no nvcc, which comes with the CUDA toolkit")
    try:
        said = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise build.BuildError(f"nvcc does not answer: {error}") from None
    return Compiler(path=path, version=said)


def _check_forward(op: Op[..., Any], entry: Entry, fixed: Sequence[str]) -> None:
    """Every parameter of the reference is passed or fixed, as what it is; nothing else is."""
    reader, symbol = op.reader, entry.symbol
    tensors = {*reader.all_tensors}
    _known(symbol, [arg.name for arg in entry.ins], tensors, f"tensor of {op.name}")
    numbers = {arg.name for arg in entry.args if isinstance(arg, Int | Float)} - entry.dimensions
    _known(symbol, sorted(numbers), {*reader.names} - tensors, f"dimension, or parameter of {op.name},")
    left = [name for name in reader.names if name not in fixed and name not in {arg.name for arg in entry.args}]
    if left:
        raise ConfigError(f"{symbol}: '{left[0]}' of {op.name} would have no effect: declare it, or fix its value")
    for arg in entry.ins:
        if arg.name in reader.optional and not arg.optional:
            raise ConfigError(f"{symbol}: {arg.name} may be None in {op.name}: In('{arg.name}', optional=True)")
    if not entry.outs or not entry.dimensions:
        raise ConfigError(f"{symbol}: a forward reads a tensor and writes one: declare In(...) and Out(...)")


def _check_backward(op: Op[..., Any], forward: Entry, entry: Entry) -> None:
    """It reads what is known in the backward pass, and writes gradients of inputs."""
    tensors, outs = {*op.reader.all_tensors}, {out.name for out in forward.outs}
    readable = tensors | outs | {f"grad_{name}" for name in outs}
    _known(entry.symbol, [arg.name for arg in entry.ins], readable, "input, output or output's gradient")
    _known(entry.symbol, [out.name for out in entry.outs], {f"grad_{name}" for name in tensors}, "input's gradient")
    numbers = {arg.name for arg in entry.args if isinstance(arg, Int | Float)} - entry.dimensions
    _known(entry.symbol, sorted(numbers), {*op.reader.names} - tensors, f"dimension, or parameter of {op.name},")
    if not entry.outs:
        raise ConfigError(f"{entry.symbol}: a backward writes a gradient: declare Out('grad_...')")


def _known(symbol: str, names: Sequence[str], choices: set[str], kind: str) -> None:
    for name in names:
        if name not in choices:
            raise ConfigError(f"{symbol}: {unknown(kind, name, choices)}")
