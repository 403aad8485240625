"""Op: a function with a slow, true definition and any number of implementations that must agree with it.

The reference is the definition and the oracle. An implementation says what it needs of the machine and of the call; the
first whose needs are met serves, unless one is chosen by name:

    op.use("native")                                        in a program
    TWOFOLD_KERNELS="linear=native,rms_norm=reference"      from outside, or --kernels of a command

The choice is made when a model is built (`op.choose(Call(...))`), or at the first plain call; a plain call looks again
only at what the needs speak of. `twofold kernels` prints the outcome and the reasons.

Whoever counts calls, or wants to know what made a tensor, enters `watch(...)`; nobody else pays for it.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import update_wrapper
from threading import get_ident
from typing import Any, Generic, Literal, ParamSpec, TypeVar

import torch

from ..core import ConfigError, Registry, unknown
from ..platforms import instruction_sets
from .reader import Reader

P = ParamSpec("P")
R = TypeVar("R")
Bits = Literal["reference", "own"]

VARIABLE = "TWOFOLD_KERNELS"
_REMEMBERED = 4096  # choices of one op: sizes of a dimension that implementations speak of can be many

log = logging.getLogger("twofold.kernels")


@dataclass(frozen=True, kw_only=True, slots=True)
class Call:
    """What an op will be called with, as far as it is known when a model is built; a need of the unknown is not unmet.

    `dtype` is that of the first tensor, `format` the weights' number format, `shapes` the sizes of named dimensions.
    """

    device: str = "cpu"
    dtype: torch.dtype | None = None
    format: str | None = None
    shapes: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Needs:
    """What an implementation needs: of the machine (`instructions`, a device that is there) and of the call.

    Empty means whatever comes. `shapes` has the sizes it takes of each dimension: {"K": multiple_of(32)}.
    """

    devices: tuple[str, ...] = ()
    instructions: tuple[str, ...] = ()
    dtypes: tuple[torch.dtype, ...] = ()
    formats: tuple[str, ...] = ()
    shapes: Mapping[str, range] = field(default_factory=dict)

    def lacking(self) -> str:
        """What this machine does not have, "" when nothing is missing."""
        absent = [name for name in self.instructions if name not in _instructions()]
        if absent:
            return f"the instructions {' '.join(absent)}"
        if self.devices and not any(_present(device) for device in self.devices):
            return f"a {' or '.join(self.devices)} device"
        return ""

    def any_call(self) -> bool:
        """Whether it takes every call, so that nothing need be asked of the arguments."""
        return not (self.devices or self.dtypes or self.formats or self.shapes)

    def unmet(self, call: Call) -> str:
        """What the call is that this implementation does not take, "" when it takes the call."""
        if self.devices and call.device not in self.devices:
            return f"device {call.device}, it takes {', '.join(self.devices)}"
        if self.dtypes and call.dtype is not None and call.dtype not in self.dtypes:
            return f"{_short(call.dtype)}, it takes {', '.join(map(_short, self.dtypes))}"
        if self.formats and call.format is not None and call.format not in self.formats:
            return f"format {call.format}, it takes {', '.join(self.formats)}"
        for letter, sizes in self.shapes.items():
            if letter in call.shapes and call.shapes[letter] not in sizes:
                return f"{letter} = {call.shapes[letter]}, it takes {_spelled(sizes)}"
        return ""


def multiple_of(step: int, most: int = 2**62) -> range:
    """Sizes step, 2·step, ... up to `most`."""
    return range(step, most + 1, step)


@dataclass(frozen=True, slots=True)
class Implementation(Generic[P, R]):
    """One way to serve an op. `missing()` returns "" when it can run on this machine, else what it lacks.

    `bits` says whether its results are the reference's to the last bit; "own" makes a fallback visible in the numbers.
    """

    name: str
    run: Callable[P, R]
    missing: Callable[[], str]
    why: str
    needs: Needs = Needs()
    bits: Bits = "reference"

    def refusal(self, call: Call) -> str:
        """Why it cannot serve such calls here, "" when it can."""
        lacking = self.needs.lacking()
        unmet = "" if lacking else self.needs.unmet(call)
        if not (lacking or unmet):
            lacking = self.missing()  # last, because it may build what is missing
        return f"lacks {lacking}" if lacking else f"is not for {unmet}" if unmet else ""


class Op(Generic[P, R]):
    """A callable op; calling it runs the implementation that serves it here."""

    def __init__(self, reference: Callable[P, R]) -> None:
        self.name = reference.__name__
        self.reference = reference
        self.implementations: dict[str, Implementation[P, R]] = {}
        self.sampler: Callable[[], tuple[Any, ...]] | None = None
        self._definition = Implementation("reference", reference, lambda: "", "the definition")
        self.reader = Reader(reference)
        self._forced: str | None = None
        self._told = False
        self._forget()
        update_wrapper(self, reference)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        if _watchers:
            here = get_ident()
            watchers = tuple(watcher for thread, watcher in _watchers if thread in (None, here))
            out: R = self._watched(watchers, args, kwargs)
            return out
        return self._run(*args, **kwargs)

    def on(
        self,
        name: str,
        *,
        why: str,
        missing: Callable[[], str] = lambda: "",
        needs: Needs = Needs(),
        bits: Bits = "reference",
    ) -> Callable[[Callable[P, R]], Callable[P, R]]:
        """Register an implementation; it comes after those that are there.

        `why` says what it gains, `missing` what this machine lacks, `bits` whether they are the reference's.

        Raises:
            ConfigError: the name is taken, or `needs` speaks of a dimension that no parameter's name has.
        """
        if name in self.implementations or name == "reference":
            raise ConfigError(f"{self.name} has an implementation called '{name}' already: choose another name")
        self.reader.must_know(needs.shapes, self.name, name)

        def add(run: Callable[P, R]) -> Callable[P, R]:
            self.implementations[name] = Implementation(name, run, missing, why, needs, bits)
            self._forget()
            return run

        return add

    def sample(self, make: Callable[[], tuple[Any, ...]]) -> Callable[[], tuple[Any, ...]]:
        """Decorator: a function that gives arguments of a typical size, for `twofold kernels` to measure with."""
        self.sampler = make
        return make

    def use(self, name: str | None) -> None:
        """Serve this op by the named implementation ("reference" is always there); None goes back to choosing."""
        self._forced = None if name is None else self._known(name)
        self._told = False
        self._forget()

    def choose(self, call: Call = Call()) -> Implementation[P, R]:
        """The implementation for such calls: what a module asks when it is built, and then calls `.run` of."""
        return self.decide(call)[0]

    def serving(self, call: Call = Call()) -> tuple[str, Callable[P, R], str]:
        """Name, function and reason of what serves such calls here."""
        chosen, why = self.decide(call)
        return chosen.name, chosen.run, why

    def decide(self, call: Call = Call()) -> tuple[Implementation[P, R], str]:
        """The choice for such calls and its reason. One that is asked for by name but cannot run here is told of."""
        asked, refusals = self.asked(), []
        for item in self._candidates(asked):
            refusal = item.refusal(call)
            if not refusal:
                return item, "chosen by name" if asked else item.why
            refusals.append(f"{item.name} {refusal}")
        if asked == "reference":
            return self._definition, "chosen by name"
        if asked and not self._told:
            log.warning("%s: %s is asked for by name, but %s; the reference serves", self.name, asked, refusals[0])
            self._told = True
        return self._definition, "; ".join(refusals) or "the definition; no other implementation yet"

    def others(self, call: Call = Call()) -> dict[str, str]:
        """Each implementation that does not serve such calls, and why; builds what is built at first use."""
        chosen = self.choose(call)
        rest = [item for item in self.implementations.values() if item is not chosen]
        why_not = "another is chosen by name" if self.asked() else "another comes first"
        return {item.name: item.refusal(call) or why_not for item in rest}

    def asked(self) -> str | None:
        """The implementation that is asked for by name, in this program or from outside; None when nobody did.

        Raises:
            ConfigError: the one that is asked for from outside is not there.
        """
        if self._forced is not None:
            return self._forced
        name = named(os.environ.get(VARIABLE, "")).get(self.name)
        return None if name is None else self._known(name)

    def implementation(self, name: str) -> Implementation[P, R]:
        """The implementation of this name. Raises ConfigError with the nearest one."""
        return self._definition if self._known(name) == "reference" else self.implementations[name]

    def _watched(self, watchers: tuple[Watcher, ...], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """The call through these watchers, the last of them outermost."""
        if not watchers:
            return self._run(*args, **kwargs)
        whole = self.reader.whole(args, kwargs)
        return watchers[-1](self, whole, lambda: self._watched(watchers[:-1], whole, {}))

    def _candidates(self, asked: str | None) -> list[Implementation[P, R]]:
        """In the order they are tried; the reference is what remains."""
        if asked is None:
            return list(self.implementations.values())
        return [self.implementations[asked]] if asked != "reference" else []

    def _known(self, name: str) -> str:
        if name != "reference" and name not in self.implementations:
            raise ConfigError(unknown(f"implementation of {self.name}", name, ["reference", *self.implementations]))
        return name

    def _forget(self) -> None:
        self._chosen: dict[tuple[Any, ...], Callable[P, R]] = {}
        self._run: Callable[P, R] = self._first

    def _first(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """The first call: one function for all that follow, unless the needs of a candidate speak of the arguments."""
        check_names()
        speaking: list[Needs] = []
        for item in self._candidates(self.asked()):
            if item.needs.lacking():
                continue
            if not item.needs.any_call():
                speaking.append(item.needs)
            elif not item.refusal(Call()):
                break
        if not speaking:
            self._run = self.choose().run
        else:
            self._letters = sorted({letter for needs in speaking for letter in needs.shapes})
            self._read = self.reader.key_of(self._letters)
            self._run = self._by_call
        return self._run(*args, **kwargs)

    def _by_call(self, *args: P.args, **kwargs: P.kwargs) -> R:
        key = self._read(args, kwargs)
        run = self._chosen.get(key)
        if run is None:
            if len(self._chosen) >= _REMEMBERED:
                self._chosen.clear()
            run = self._chosen[key] = self.choose(Call(**self.reader.told(key, self._letters))).run
        return run(*args, **kwargs)


Watcher = Callable[[Op[..., Any], tuple[Any, ...], Callable[[], Any]], Any]
"""(op, all its arguments by place, the call) to the call's result, which it makes by calling, and may look at."""

_watchers: list[tuple[int | None, Watcher]] = []


@contextmanager
def watch(watcher: Watcher, *, everywhere: bool = False) -> Iterator[None]:
    """While entered, calls of ops in this thread go through `watcher`, calls inside calls too.

    `everywhere`: in all threads, for a backward pass on a device has one of its own.
    """
    entry = None if everywhere else get_ident(), watcher
    _watchers.append(entry)
    try:
        yield
    finally:
        _watchers.remove(entry)


@contextmanager
def unwatched() -> Iterator[None]:
    """While entered, nobody watches: for a gradient that goes through other ops, which are its own affair."""
    kept, _watchers[:] = _watchers[:], []
    try:
        yield
    finally:
        _watchers[:] = kept


ops: Registry[Op[..., object]] = Registry("op")


def op(reference: Callable[P, R]) -> Op[P, R]:
    """Decorator: the function becomes an Op, listed under its name."""
    made = Op(reference)
    ops.register(made.name)(made)  # type: ignore[arg-type]
    return made


def all_ops() -> Iterator[Op[..., object]]:
    """Every op by name."""
    return (ops[name] for name in ops)


def named(text: str) -> dict[str, str]:
    """ "linear=native,rms_norm=reference" as a table. Raises ConfigError for a piece that is not op=implementation."""
    table = {}
    for piece in filter(None, (piece.strip() for piece in text.split(","))):
        name, sign, implementation = (part.strip() for part in piece.partition("="))
        if not (name and sign and implementation):
            raise ConfigError(f"{VARIABLE} takes op=implementation pairs, such as linear=reference, not '{piece}'")
        table[name] = implementation
    return table


def use_named(text: str) -> None:
    """Serve ops as "linear=native,rms_norm=reference" says, here and in the processes that this one starts.

    Raises:
        ConfigError: it names an op or an implementation there is not; then nothing is changed.
    """
    for name, implementation in named(text).items():
        ops[name].implementation(implementation)
    os.environ[VARIABLE] = text
    for item in all_ops():
        item.use(None)


def check_names() -> None:
    """Raises ConfigError, with the nearest name, when the environment names an op or an implementation there is not."""
    for name, implementation in named(os.environ.get(VARIABLE, "")).items():
        ops[name].implementation(implementation)


_instructions = functools.cache(instruction_sets)


def _present(device: str) -> bool:
    return device == "cpu" or (device == "cuda" and torch.cuda.is_available())


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _spelled(sizes: range) -> str:
    high = f" up to {sizes[-1]}" if sizes and sizes.stop < 2**32 else ""
    return f"{sizes.start} and on{high}" if sizes.step == 1 else f"multiples of {sizes.step} from {sizes.start}{high}"
