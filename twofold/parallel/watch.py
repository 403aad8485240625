"""Watch: the collectives that each rank has come to, by torch's flight recorder, and the first that differs.

    zero     rank 0   ... #39 all_gather   #40 all_gather   #41 reduce_scatter
             rank 1   ... #39 all_gather   #40 all_gather   #41 all_reduce         they will wait for ever

The recorder is a ring in torch's own C++ (`TORCH_FR_BUFFER_SIZE`): it sees those of FSDP, of functional collectives and
of our own code, on gloo as on NCCL, whoever calls them, and costs no Python. (A reduce-scatter
of gloo is an all-reduce there.)
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

SAME_SHAPE = ("all_reduce", "all_gather", "reduce_scatter", "broadcast")
"""Collectives whose tensors have one shape on every rank; the others divide as their callers like."""
DTYPES = {"Float": "fp32", "BFloat16": "bf16", "Half": "fp16", "Double": "fp64", "Long": "int64", "Byte": "uint8"}


@dataclass(frozen=True, kw_only=True)
class Call:
    """One collective of one rank: the `number`-th of its group."""

    group: str
    number: int
    name: str
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[str, ...]
    at: int
    """When it was begun, in nanoseconds."""
    done: bool

    @classmethod
    def read(cls, row: Mapping[str, Any]) -> Call:
        """From what `calls` wrote as JSON."""
        shapes = tuple(tuple(shape) for shape in row["shapes"])
        return cls(**{**row, "shapes": shapes, "dtypes": tuple(row["dtypes"])})

    def __str__(self) -> str:
        what = ", ".join(f"{list(shape)} {dtype}" for shape, dtype in zip(self.shapes, self.dtypes, strict=False))
        return f"{self.name} #{self.number}{what and ' ' + what}"

    def agrees(self, other: Call) -> bool:
        """Whether two ranks may meet in these."""
        same = self.name == other.name and self.dtypes == other.dtypes
        return same and (self.name not in SAME_SHAPE or self.shapes == other.shapes)


def calls() -> list[Call]:
    """The last collectives of this rank, oldest first; what is sent from one rank to one other is left out."""
    from torch._C import _distributed_c10d as c10d

    told = json.loads(c10d._dump_fr_trace_json(True, False))  # type: ignore[attr-defined]
    return [_call(entry) for entry in told.get("entries", ()) if not entry["is_p2p"]]


def _call(entry: Mapping[str, Any]) -> Call:
    return Call(
        group=str(entry["process_group"][0]),
        number=entry["collective_seq_id"],
        name=entry["profiling_name"].rpartition(":")[2].strip("_"),
        shapes=tuple(tuple(shape) for shape in entry["input_sizes"]),
        dtypes=tuple(DTYPES.get(dtype, dtype) for dtype in entry["input_dtypes"]),
        at=entry["time_created_ns"],
        done=entry["retired"],
    )


@dataclass(frozen=True, kw_only=True)
class Group:
    """A process group: what it is called here, and its ranks."""

    name: str
    ranks: tuple[int, ...]


def first_difference(told: Mapping[int, Sequence[Call]], groups: Mapping[str, Group]) -> str | None:
    """One line about the first collective that not all of its ranks came to alike; None when all did.

    `told` are the calls of each rank that says any; groups that are not in `groups` are not looked at. Two ranks in
    different collectives say more than one that is missing, and come first.
    """
    found = [line for group, known in groups.items() if (line := _in_group(group, known, told))]
    return min(found)[2] if found else None


def _in_group(group: str, known: Group, told: Mapping[int, Sequence[Call]]) -> tuple[int, int, str] | None:
    """(0 for different calls, 1 for a missing one; when; the line) of the first difference in one group."""
    by_rank = {
        rank: {call.number: call for call in told[rank] if call.group == group} for rank in known.ranks if rank in told
    }
    if len(by_rank) < 2:
        return None
    oldest = max((min(mine, default=0) for mine in by_rank.values()), default=0)  # a ring forgets
    for number in sorted({n for mine in by_rank.values() for n in mine if n >= oldest}):
        here = {rank: mine[number] for rank, mine in by_rank.items() if number in mine}
        first, one = next(iter(here.items()))
        when = min(call.at for call in here.values())
        other = next((rank for rank, call in here.items() if not call.agrees(one)), None)
        if other is not None:
            return 0, when, f"rank {other} is at {here[other]} on {known.name}, rank {first} at {one}"
        missing = [rank for rank in by_rank if rank not in here]
        if missing:
            last = by_rank[missing[0]].get(number - 1)
            there = f"its last there is {last}" if last else "it has come to none there"
            who, rest = f"rank {missing[0]}", f" nor {', '.join(f'rank {r}' for r in missing[1:])}" * (len(missing) > 1)
            return 1, when, f"rank {first} waits in {one} on {known.name}, to which {who}{rest} has not come ({there})"
    return None
