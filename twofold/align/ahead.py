"""Ahead: rollouts of the next step while the trainer works on this one, by weights that are one update old.

    trainer    take 0 │ update 0 │ send v1 │ take 1 │ update 1 │ send v2 │ take 2 ...
    generator  roll 0 │ roll 1, all by v0 ·········│ swap v1 │ roll 2, all by v1 ··│ swap v2 ...

Batch k + 1 is made by version k alone: new weights travel while it is rolled out, and are swapped in behind its last
token. So what is trained on depends on seed, step and version, never on who was faster; and a run that is killed and
resumed goes on with the same bits, for the batch that is under way goes into the checkpoint.
(One-step off-policy, as verl's `one_step_off` and AReaL with max_head_offpolicyness = 1; here it repeats to the bit.)
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Generic, TypeVar

import msgspec
from torch import Tensor

from ..core import CheckpointError, StateError
from .remote import RemoteEngine, Transfer

T = TypeVar("T")


class Ahead(Generic[T]):
    """At most one batch is under way. `send`, then `take` one step after another, with a `send` behind each update.

    `roll(step)` makes a step's batch on `remote` and returns when it is complete; it runs in a thread and is a function
    of the step and of the weights. `kind` is what it returns, of dataclasses and plain values (`tuple[Group, ...]`, or
    a dataclass with rewards beside the groups). `steps` is where the run ends: nothing is rolled out for a step behind.
    """

    def __init__(self, remote: RemoteEngine, roll: Callable[[int], T], kind: Any, *, steps: int) -> None:
        self.remote, self.steps = remote, steps
        self._roll, self._kind = roll, kind
        self._thread: threading.Thread | None = None
        self._step: int | None = None
        self._values: list[T] = []
        self._fault: BaseException | None = None
        self._staged = False

    def send(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> Transfer:
        """Send the weights of an update while the generator goes on; in force from the batch after this one.

        Raises:
            as `RemoteEngine.stage`; the batch under way is not touched by it.
        """
        told = self.remote.stage(named_tensors, version)
        self._staged = True
        return told

    def take(self, step: int) -> T:
        """The batch of a step, waiting for it; the next one is begun, by the newest weights that were sent.

        Raises:
            StateError: another step is under way.
            Exception: what `roll` raised.
        """
        if self._step not in (None, step):
            raise StateError(f"step {self._step} is under way, not {step}: take one step after another")
        self._join()
        self._swap()
        value = self._values.pop() if self._step == step else self._roll(step)
        self._step = None
        if step + 1 < self.steps:
            self._begin(step + 1)
        return value

    def state(self) -> dict[str, Any] | None:
        """The batch under way as plain data, complete: it is waited for. None when there is none.

        Raises:
            Exception: what `roll` raised.
        """
        self._join()
        if self._step is None:
            return None
        return {"step": self._step, "batch": msgspec.to_builtins(self._values[0])}

    def restore(self, state: Mapping[str, Any] | None) -> None:
        """Take back what `state` gave, in a new run, before the first `take`.

        Raises:
            CheckpointError: it is no batch of this kind.
            StateError: a batch is under way.
        """
        if self._step is not None:
            raise StateError(f"step {self._step} is under way: restore before the first take")
        if state is None:
            return
        try:
            self._values = [msgspec.convert(state["batch"], self._kind)]
            self._step = int(state["step"])
        except (msgspec.ValidationError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"the checkpoint's batch of rollouts cannot be read: {error}") from None

    def close(self) -> None:
        """Wait for what is under way to end, which the end of `remote` makes it do; nobody asks for it any more."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _swap(self) -> None:
        if self._staged:
            self.remote.swap()
            self._staged = False

    def _begin(self, step: int) -> None:
        self._step, self._values, self._fault = step, [], None
        self._thread = threading.Thread(target=self._run, args=(step,), name=f"rollouts-{step}", daemon=True)
        self._thread.start()

    def _run(self, step: int) -> None:
        try:
            self._values.append(self._roll(step))
        except BaseException as error:
            self._fault = error

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._fault is not None:
            raise self._fault
