"""What a step says to the other ranks: calls, bytes and time of each collective in each group (`--profile-comm`).

    all_gather                   bytes of the whole result     sent  bytes · (N - 1) / N
    reduce_scatter               bytes of the whole input      sent  bytes · (N - 1) / N
    all_to_all, scatter, gather  bytes of the larger side      sent  bytes · (N - 1) / N
    all_reduce                   bytes of the tensor           sent  bytes · 2 (N - 1) / N
    broadcast, reduce, send      bytes of the tensor           sent  bytes

"sent" is what one rank sends when it is done in a ring (Rabenseifner 2004, Patarasuk and Yuan 2009). Calls are seen in
torch's dispatcher, so those of FSDP, of functional collectives and of our own code all count. Each is waited for before
the next begins: its time is its own, and none of it hides behind computation as it may in a usual step. (But for send
and recv, whose partner may be waiting for our next: their time is that of asking.)
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

FILE = "comm.json"
STEPS = 3, 5
"""First and last step, counted from one, that are looked at."""

NAMES = {
    "allreduce_": "all_reduce",
    "allreduce_coalesced_": "all_reduce",
    "all_reduce": "all_reduce",
    "all_reduce_": "all_reduce",
    "all_reduce_coalesced": "all_reduce",
    "allgather_": "all_gather",
    "_allgather_base_": "all_gather",
    "allgather_coalesced_": "all_gather",
    "allgather_into_tensor_coalesced_": "all_gather",
    "all_gather_into_tensor": "all_gather",
    "all_gather_into_tensor_out": "all_gather",
    "all_gather_into_tensor_coalesced": "all_gather",
    "reduce_scatter_": "reduce_scatter",
    "_reduce_scatter_base_": "reduce_scatter",
    "reduce_scatter_tensor_coalesced_": "reduce_scatter",
    "reduce_scatter_tensor": "reduce_scatter",
    "reduce_scatter_tensor_coalesced": "reduce_scatter",
    "alltoall_": "all_to_all",
    "alltoall_base_": "all_to_all",
    "all_to_all_single": "all_to_all",
    "broadcast_": "broadcast",
    "broadcast": "broadcast",
    "reduce_": "reduce",
    "gather_": "gather",
    "scatter_": "scatter",
    "send": "send",
    "recv_": "recv",
    "recv_any_source_": "recv",
    "barrier": "barrier",
}
"""Ops of torch's `c10d` and `_c10d_functional`, by what they are called here."""


@dataclass(slots=True)
class Total:
    """All calls of one collective in one group."""

    ranks: int
    calls: int = 0
    bytes: int = 0
    sent: int = 0
    seconds: float = 0.0


class Collectives(TorchDispatchMode):
    """Enter it, and `found` has the totals by (collective, group)."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[tuple[str, str], Total] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if any(kind is not Tensor and kind is not Parameter for kind in types):
            return NotImplemented  # a sharded tensor's collectives come by again, on plain ones
        if func.namespace not in ("c10d", "_c10d_functional"):
            return func(*args, **kwargs)
        name = NAMES.get(func._schema.name.partition("::")[2])
        if name is None:  # waiting, and the like
            return func(*args, **kwargs)
        start = time.perf_counter()
        out = func(*args, **kwargs)
        _finish(func.namespace, name, out)
        self._add(name, func, args, kwargs, out, time.perf_counter() - start)
        return out

    def _add(self, name: str, func: Any, args: Any, kwargs: Any, out: Any, seconds: float) -> None:
        group, ranks = _group(func, args, kwargs)
        total = self.found.setdefault((name, group), Total(ranks))
        sides = [_nbytes(given) for given in (*args, *kwargs.values(), out)]
        size = 0 if name == "barrier" else max(sides)
        total.calls += 1
        total.bytes += size
        total.sent += sent(name, size, ranks)
        total.seconds += seconds


def sent(name: str, size: int, ranks: int) -> int:
    """Bytes that one of `ranks` sends, on average, for a collective of `size` bytes."""
    if name in ("send", "broadcast", "reduce"):
        return size
    if name == "recv":
        return 0
    return size * (ranks - 1) // ranks * (2 if name == "all_reduce" else 1)


def table(found: dict[tuple[str, str], Total], steps: int = 1) -> str:
    """A row for each collective and group, of one step; the most bytes first."""
    rows: list[tuple[str, ...]] = [("collective", "group", "ranks", "calls", "MiB", "sent MiB", "ms")]
    for (name, group), total in sorted(found.items(), key=lambda item: -item[1].bytes):
        mib = (f"{size / steps / 2**20:.3f}" for size in (total.bytes, total.sent))
        calls = total.calls / steps
        rows.append((name, group, str(total.ranks), f"{calls:g}", *mib, f"{1e3 * total.seconds / steps:.2f}"))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.rjust(w) if i > 1 else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths)))
        for row in rows
    )


class CommProfile:
    """Goes around the trainer's steps; after the last one that it wants it says the table and writes `comm.json`."""

    def __init__(self, folder: Path, say: Callable[[str], None]) -> None:
        self._folder, self._say, self._seen, self._mode = folder, say, 0, Collectives()

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """One step of the trainer is done inside."""
        self._seen += 1
        first, last = STEPS
        if not first <= self._seen <= last:
            yield
            return
        with self._mode:
            yield
        if self._seen == last and main():
            self._report(last - first + 1)

    def _report(self, steps: int) -> None:
        found = self._mode.found
        rows = [{"collective": name, "group": group} | asdict(total) for (name, group), total in found.items()]
        record = json.dumps({"steps": steps, "collectives": rows}, indent=1)
        (self._folder / FILE).write_text(record + "\n", encoding="utf-8")
        self._say(f"collectives of one step, the mean of {steps}, each waited for by itself")
        self._say(table(found, steps) if found else "none: this run is one process")


def main() -> bool:
    """Whether this process speaks for all."""
    return not (distributed.is_available() and distributed.is_initialized()) or distributed.get_rank() == 0


def _nbytes(given: Any) -> int:
    return sum(x.nbytes for x in tree_iter(given) if isinstance(x, Tensor))


def _finish(namespace: str, name: str, out: Any) -> None:
    """Wait until it is done."""
    if name in ("send", "recv"):
        return
    if namespace == "_c10d_functional":
        for x in tree_iter(out):
            torch.ops._c10d_functional.wait_tensor(x)
        return
    for x in tree_iter(out):
        if isinstance(x, torch.ScriptObject):
            distributed.Work.unbox(x).wait()
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _group(func: Any, args: Any, kwargs: Any) -> tuple[str, int]:
    """What a group is called, and how many ranks it has."""
    for given in (*args, *kwargs.values()):
        if func.namespace == "c10d" and isinstance(given, torch.ScriptObject):
            try:
                group = distributed.ProcessGroup.unbox(given)
            except RuntimeError:  # the kind of reduction, or the like
                continue
            return group.group_desc or group.group_name, group.size()
    names = [given for given in (*args, *kwargs.values()) if isinstance(given, str)]
    group = torch._C._distributed_c10d._resolve_process_group(names[-1])  # type: ignore[arg-type]
    return group.group_desc or group.group_name, group.size()
