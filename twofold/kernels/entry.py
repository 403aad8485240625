"""Entry: a function with a C ABI, told in words that a pointer can be checked against before it is passed.

    Entry("swish", In("x_TD"), Out("y_TD"), Int("T"), Int("D"), Float("beta"))

    void swish(const float* x_TD, float* y_TD, int64_t T, int64_t D, double beta)

Names are those of the reference's parameters, and tensors carry their shapes in them (`shapes.py`): ranks and sizes are
checked, outputs are made, and an `Int` is a dimension or a whole-number parameter. The same words make the prototype
that the compiler holds the source against: a mismatch is an error of the build, never a crash.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..core import ConfigError
from .shapes import axes, learn, letters, shape_of

C_TYPES = {
    torch.float32: "float",
    torch.float64: "double",
    torch.bfloat16: "uint16_t",
    torch.float16: "uint16_t",
    torch.int64: "int64_t",
    torch.int32: "int32_t",
    torch.int8: "int8_t",
    torch.uint8: "uint8_t",
    torch.bool: "bool",
}
_ROOM = ctypes.create_string_buffer(4096)
_NOWHERE = ctypes.addressof(_ROOM)  # what an empty tensor points at: only a tensor that is not given is a null pointer
MISMATCH = "twofold: the source and the declaration differ"

Make = Callable[[tuple[int, ...], torch.dtype, torch.device], Tensor]


@dataclass(frozen=True, slots=True)
class In:
    """A tensor that is read: contiguous when it arrives, of the kernel's dtype unless one is given.

    An `optional` one may be None, a null pointer in C.
    """

    name: str
    dtype: torch.dtype | None = None
    optional: bool = False


@dataclass(frozen=True, slots=True)
class Out:
    """A tensor that is written, every number of it: made empty, of the shape in its name."""

    name: str
    dtype: torch.dtype | None = None


@dataclass(frozen=True, slots=True)
class Int:
    """An int64_t: the size of the dimension of this letter, or a parameter of this name."""

    name: str


@dataclass(frozen=True, slots=True)
class Float:
    """A double: a parameter of this name."""

    name: str


Argument = In | Out | Int | Float


class Entry:
    """A C function `void symbol(args...)`.

    Raises:
        ConfigError: the symbol is no C identifier, a name occurs twice, a tensor's name says no shape, or a letter of
            an output or an Int is in no input.
    """

    def __init__(self, symbol: str, *args: Argument) -> None:
        if not (symbol.isascii() and symbol.isidentifier()):
            raise ConfigError(f"'{symbol}' is no name of a C function")
        self.symbol, self.args = symbol, args
        self.ins = [arg for arg in args if isinstance(arg, In)]
        self.outs = [arg for arg in args if isinstance(arg, Out)]
        names = [arg.name for arg in args]
        twice = [name for name in names if names.count(name) > 1]
        if twice:
            raise ConfigError(f"{symbol}: '{twice[0]}' is declared twice")
        for tensor in (arg for arg in args if isinstance(arg, In | Out)):
            if axes(tensor.name) is None:
                shape_of(tensor.name, {})
        known = set[str]().union(*(letters(arg.name) for arg in self.ins if not arg.optional))
        for out in self.outs:
            if letters(out.name) - known:
                raise ConfigError(f"{symbol}: no input that is always given tells the shape of '{out.name}'")

    @property
    def dimensions(self) -> set[str]:
        """The letters that the inputs tell."""
        return set[str]().union(*(letters(arg.name) for arg in self.ins if not arg.optional))

    def prototype(self, dtype: torch.dtype, stream: bool = False) -> str:
        """The C declaration; kernels for a device take its stream last."""
        return f"void {self.symbol}({', '.join(self._parameters(dtype, stream))})"

    def glue(self, dtype: torch.dtype, stream: bool = False) -> str:
        """C++ that follows the user's source: the compiler compares the signatures, and one symbol is exported."""
        parameters = self._parameters(dtype, stream)
        types = ", ".join(parameter.rpartition(" ")[0] for parameter in parameters)
        names = ", ".join(parameter.rpartition(" ")[2] for parameter in parameters)
        say = f"{MISMATCH}: declare {self.prototype(dtype, stream)}"
        return (
            f"\nstatic_assert(std::is_convertible_v<decltype(&{self.symbol}), void (*)({types})>,"
            f' "{say}");\n'
            f'extern "C" __attribute__((visibility("default")))\n'
            f"void twofold_{self.symbol}({', '.join(parameters)}) {{ {self.symbol}({names}); }}\n"
        )

    def bind(self, library: ctypes.CDLL, stream: bool = False) -> Callable[..., None]:
        """The exported function, with its ctypes signature."""
        function = library[f"twofold_{self.symbol}"]
        kinds: list[Any] = [
            ctypes.c_int64 if isinstance(arg, Int) else ctypes.c_double if isinstance(arg, Float) else ctypes.c_void_p
            for arg in self.args
        ]
        function.argtypes, function.restype = [*kinds, ctypes.c_void_p] if stream else kinds, None
        return function

    def arguments(
        self, given: Mapping[str, Any], dtype: torch.dtype, device: str, make: Make
    ) -> tuple[list[Any], tuple[Tensor, ...], list[Tensor]]:
        """What C is given, the outputs, and the tensors that must outlive the call.

        Raises:
            ConfigError: a tensor of another device, dtype or shape, or a number of another kind than declared.
        """
        sizes: dict[str, int] = {}
        kept = {arg.name: self._checked(arg, given[arg.name], dtype, device, sizes) for arg in self.ins}
        there = next(tensor.device for tensor in kept.values() if tensor is not None)
        passed: list[Any] = []
        outs: list[Tensor] = []
        for arg in self.args:
            if isinstance(arg, In):
                tensor = kept[arg.name]
                passed.append(None if tensor is None else tensor.data_ptr() or _NOWHERE)
            elif isinstance(arg, Out):
                outs.append(make(shape_of(arg.name, sizes), arg.dtype or dtype, there))
                passed.append(outs[-1].data_ptr() or _NOWHERE)
            elif isinstance(arg, Int) and arg.name in sizes:
                passed.append(sizes[arg.name])
            else:
                passed.append(self._number(arg, given[arg.name]))
        return passed, tuple(outs), [tensor for tensor in kept.values() if tensor is not None]

    def _checked(self, arg: In, value: Any, dtype: torch.dtype, device: str, sizes: dict[str, int]) -> Tensor | None:
        if value is None and arg.optional:
            return None
        if not isinstance(value, Tensor):
            raise ConfigError(f"{self.symbol}: {arg.name} is a {type(value).__name__}, not a tensor")
        wanted = arg.dtype or dtype
        if value.dtype != wanted or value.device.type != device or value.layout != torch.strided:
            raise ConfigError(
                f"{self.symbol}: {arg.name} is {value.dtype} on {value.device.type}; the kernel takes {wanted} on "
                f'{device}: convert it, or serve the op by its reference, .use("reference")'
            )
        learn(sizes, arg.name, value.shape)
        return value if value.is_contiguous() else value.detach().contiguous()

    def _number(self, arg: Int | Float, value: Any) -> int | float:
        if isinstance(arg, Int) and isinstance(value, int) and -(2**63) <= value < 2**63:
            return value
        if isinstance(arg, Float) and isinstance(value, int | float):
            return float(value)
        wanted = "whole number of 64 bits" if isinstance(arg, Int) else "number"
        raise ConfigError(f"{self.symbol}: {arg.name} is {value!r}, not a {wanted}")

    def _parameters(self, dtype: torch.dtype, stream: bool) -> list[str]:
        found = []
        for arg in self.args:
            match arg:
                case In(name, own):
                    found.append(f"const {C_TYPES[own or dtype]}* {name}")
                case Out(name, own):
                    found.append(f"{C_TYPES[own or dtype]}* {name}")
                case Int(name):
                    found.append(f"int64_t {name}")
                case Float(name):
                    found.append(f"double {name}")
        return [*found, "void* stream"] if stream else found
