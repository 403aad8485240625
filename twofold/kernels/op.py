"""Op: a function with a slow, true definition and any number of implementations that must agree with it.

The reference is the definition and the oracle. An implementation says what it needs; the first whose needs are met
serves the op here, unless one is chosen by name. `twofold kernels` prints the outcome and the reasons.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import update_wrapper
from typing import Generic, ParamSpec, TypeVar

from ..core import ConfigError, Registry, unknown

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class Implementation(Generic[P, R]):
    """One way to serve an op. `missing()` returns "" when it can run on this machine, else what it lacks."""

    name: str
    run: Callable[P, R]
    missing: Callable[[], str]
    why: str


class Op(Generic[P, R]):
    """A callable op; calling it runs the implementation that serves it here."""

    def __init__(self, reference: Callable[P, R]) -> None:
        self.name = reference.__name__
        self.reference = reference
        self.implementations: dict[str, Implementation[P, R]] = {}
        self._serving: Callable[P, R] | None = None
        self._forced: str | None = None
        update_wrapper(self, reference)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        if self._serving is None:
            self._serving = self.serving()[1]
        return self._serving(*args, **kwargs)

    def on(
        self, name: str, *, why: str, missing: Callable[[], str] = lambda: ""
    ) -> Callable[[Callable[P, R]], Callable[P, R]]:
        """Register an implementation called `name`; `why` says what it gains, `missing` what this machine lacks."""

        def add(run: Callable[P, R]) -> Callable[P, R]:
            self.implementations[name] = Implementation(name, run, missing, why)
            self._serving = None
            return run

        return add

    def use(self, name: str | None) -> None:
        """Serve this op by the named implementation ("reference" is always there); None goes back to choosing."""
        if name is not None and name != "reference" and name not in self.implementations:
            raise ConfigError(unknown(f"implementation of {self.name}", name, ["reference", *self.implementations]))
        self._forced, self._serving = name, None

    def serving(self) -> tuple[str, Callable[P, R], str]:
        """Name, function and reason of what serves this op here."""
        if self._forced == "reference":
            return "reference", self.reference, "chosen by name"
        lacking: list[str] = []
        for item in self.implementations.values():
            if self._forced not in (None, item.name):
                continue
            missing = item.missing()
            if not missing:
                return item.name, item.run, "chosen by name" if self._forced else item.why
            lacking.append(f"{item.name} lacks {missing}")
        return "reference", self.reference, "; ".join(lacking) or "the definition; no other implementation yet"


ops: Registry[Op[..., object]] = Registry("op")


def op(reference: Callable[P, R]) -> Op[P, R]:
    """Decorator: the function becomes an Op, listed under its name."""
    made = Op(reference)
    ops.register(made.name)(made)  # type: ignore[arg-type]
    return made


def all_ops() -> Iterator[Op[..., object]]:
    """Every op by name."""
    return (ops[name] for name in ops)
