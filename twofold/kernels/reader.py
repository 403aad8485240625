"""Reader: what the choice of an implementation hangs on, read from a call's arguments in well under a microsecond."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from ..core import ConfigError
from .shapes import axes, letters

Key = tuple[Any, ...]

TENSOR = (torch.Tensor, "Tensor", "torch.Tensor")  # a parameter's annotation, or its text
OPTIONAL = (torch.Tensor | None, "Tensor | None", "torch.Tensor | None")


class Reader:
    """Knows where the parameters of a function carry its tensors, their dimensions and a number format.

    Only tensors that are always given count: a parameter annotated `Tensor`, not `Tensor | None`.
    """

    def __init__(self, function: Callable[..., object]) -> None:
        self.signature = inspect.signature(function)
        parameters = self.signature.parameters
        self.names = list(parameters)
        self.defaults = {name: p.default for name, p in parameters.items() if p.default is not inspect.Parameter.empty}
        self.tensors = [name for name, p in parameters.items() if p.annotation in TENSOR]
        self.all_tensors = [name for name, p in parameters.items() if p.annotation in (*TENSOR, *OPTIONAL)]
        self.optional = [name for name, p in parameters.items() if p.annotation in OPTIONAL]

    def must_know(self, wanted: Iterable[str], op: str, implementation: str) -> None:
        """Raises ConfigError for a dimension that no tensor's name has."""
        known = {letter for name in self.tensors for letter in letters(name)}
        for letter in wanted:
            if letter not in known:
                raise ConfigError(
                    f"{op}: implementation '{implementation}' needs sizes of {letter}, but the reference's tensors "
                    f"speak of {', '.join(sorted(known)) or 'no dimension'}: end a name in it, such as x_T{letter}"
                )

    def key_of(self, wanted: list[str]) -> Callable[[tuple[Any, ...], Mapping[str, Any]], Key]:
        """A function from a call's arguments to what `told` reads: first tensor's device and dtype, format, sizes."""
        first = self.names.index(self.tensors[0]) if self.tensors else None
        places = [self._place(letter)[:2] for letter in wanted]
        format_at = self.names.index("format") if "format" in self.names else None
        last = max([first or 0, format_at or 0, *(at for at, _ in places)])

        def read(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Key:
            if kwargs or len(args) <= last:
                args = self.whole(args, kwargs)
            if first is None:
                return ("cpu", None, args[format_at] if format_at is not None else None)
            x = args[first]
            key = (x.is_cpu or x.device.type, x.dtype, args[format_at] if format_at is not None else None)
            return key + tuple([args[at].shape[axis] for at, axis in places]) if places else key

        return read

    def told(self, key: Key, wanted: list[str]) -> dict[str, Any]:
        """What a key says, by the names of Call's fields."""
        device, dtype, format, *sizes = key
        shapes = {letter: size // self._place(letter)[2] for letter, size in zip(wanted, sizes, strict=True)}
        return {"device": "cpu" if device is True else device, "dtype": dtype, "format": format, "shapes": shapes}

    def whole(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
        """All arguments by place. Raises TypeError, as the function itself would, for arguments that do not fit."""
        given: dict[str, Any] = {**self.defaults, **dict(zip(self.names, args, strict=False)), **kwargs}
        if len(given) != len(self.names) or len(args) + len(kwargs) > len(self.names):
            self.signature.bind(*args, **kwargs)
        return tuple(given[name] for name in self.names)

    def _place(self, letter: str) -> tuple[int, int, int]:
        """Parameter, axis and factor of the first appearance of a letter."""
        for name in self.tensors:
            for axis, (factor, own) in enumerate(axes(name) or ()):
                if own == letter:
                    return self.names.index(name), axis, factor
        raise KeyError(letter)
