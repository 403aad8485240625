"""Ledger: who holds how many bytes, phase by phase, on a machine whose memory serves training and rollouts in turn.

    phase      weights  gathered  gradients   states  KV cache  program  reference  rollouts     total
    rollout   12.0 MiB         -          -  24.0 MiB  63.0 MiB  50.1 MiB          -   1.1 MiB  150 MiB
    update    12.0 MiB         -   12.0 MiB  24.0 MiB         -         -          -   1.1 MiB   49 MiB

Each storage is counted once, for the holder that was named first: what the engine shares with the trainer is the
trainer's, and the engine's own weights are a column of nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn

from ..engine.engine import Engine
from ..models.decoder import Decoder
from ..train.optimizer import Optimizer
from ..train.zero import Zero, local
from .episode import Rollout

Held = Iterable[Tensor] | int
"""Tensors, or a number of bytes of what is none."""


class Ledger:
    """Holders by name, asked at each `read`; `phases` has what each phase's last reading found."""

    def __init__(self) -> None:
        self._holders: dict[str, Callable[[], Held]] = {}
        self.phases: dict[str, dict[str, int]] = {}

    def holds(self, name: str, what: Callable[[], Held]) -> None:
        """Name a holder; of what two of them hold, the earlier one is said to."""
        self._holders[name] = what

    def read(self, phase: str) -> dict[str, int]:
        """Bytes of each holder now, kept as those of this phase."""
        seen: set[tuple[str, int]] = set()
        found: dict[str, int] = {}
        for name, ask in self._holders.items():
            held = ask()
            found[name] = held if isinstance(held, int) else sum(_fresh(tensor, seen) for tensor in held)
        self.phases[phase] = found
        return found

    def record(self) -> dict[str, dict[str, int]]:
        """For the journal: bytes by phase and holder, with their sum as "total"."""
        return {phase: {**found, "total": sum(found.values())} for phase, found in self.phases.items()}

    def table(self) -> str:
        """For people: a line for each phase, a column for each holder that ever held anything."""
        record = self.record()
        names = [name for name in self._holders if any(found.get(name) for found in record.values())]
        rows = [["phase", *names, "total"]]
        rows += [[phase, *(size(found.get(name, 0)) for name in (*names, "total"))] for phase, found in record.items()]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join(
            "  ".join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))])
            for row in rows
        )


def of_trainer(ledger: Ledger, zero: Zero[Decoder], optimizer: Optimizer) -> None:
    """Name what a trainer holds: this rank's weights, what is gathered of the others', gradients, the rule's states.

    Called while nothing is gathered.
    """
    shards = {name: local(weight.detach()) for name, weight in zero.decoder.named_parameters()}
    names = list(optimizer.weights)

    def gradients() -> list[Tensor]:
        return [grad for name in names if (grad := optimizer.gradient(name)) is not None]

    def states() -> list[Tensor]:
        kept = [state for each in optimizer.kept.values() for state in each.values()]
        return [*kept, *map(optimizer.master, names)]

    ledger.holds("weights", lambda: [*shards.values(), *zero.decoder.buffers()])
    ledger.holds("gathered", lambda: [local(weight.detach()) for weight in zero.decoder.parameters()])
    ledger.holds("gradients", gradients)
    ledger.holds("states", states)


def of_engine(ledger: Ledger, engine: Callable[[], Engine | None]) -> None:
    """Name what an engine holds; it may not be there yet."""

    def weights() -> Held:
        found = engine()
        return _of(found.decoder) if found else 0

    def cache() -> Held:
        found = engine()
        return found.runner.cache.nbytes if found and found.runner.cache else 0

    def program() -> Held:
        found = engine()
        return found.runner.program.nbytes if found and found.runner.program else 0

    ledger.holds("engine's weights", weights)
    ledger.holds("KV cache", cache)
    ledger.holds("program", program)


def of_model(ledger: Ledger, name: str, module: nn.Module) -> None:
    """Name a model that only reads, such as a reference policy, or a set of adapters."""
    ledger.holds(name, lambda: _of(module))


def of_rollouts(rollouts: Iterable[Rollout]) -> int:
    """Bytes of rollouts as Python holds them."""
    total = 0
    for each in rollouts:
        total += sum(map(sys.getsizeof, (each.ids, each.logprobs, each.mine, each.versions, each.text)))
        total += sum(map(sys.getsizeof, each.ids)) + sum(map(sys.getsizeof, each.logprobs))
    return total


def size(nbytes: int) -> str:
    """A number of bytes for people; "-" for none."""
    if not nbytes:
        return "-"
    amount, unit = float(nbytes), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if amount < 1000 or unit == "TiB":
            break
        amount /= 1024
    return f"{amount:.3g} {unit}"


def _of(module: nn.Module) -> list[Tensor]:
    return [local(tensor.detach()) for tensor in (*module.parameters(), *module.buffers())]


def _fresh(tensor: Tensor, seen: set[tuple[str, int]]) -> int:
    """Bytes of a tensor's storage the first time it is met."""
    storage: Any = tensor.untyped_storage()
    key = (str(tensor.device), storage.data_ptr())
    if key in seen or not storage.nbytes():
        return 0
    seen.add(key)
    return int(storage.nbytes())
