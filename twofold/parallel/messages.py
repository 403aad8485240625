"""What ranks tell each other in words: JSON through collectives, so that nothing is ever unpickled."""

from __future__ import annotations

import json
from typing import Any

import torch
import torch.distributed as dist

from .comm import Group


def everyone(value: Any, group: Group) -> list[Any]:
    """What each rank of `group` says, in order; a collective. JSON goes in and out, so tuples come back as lists."""
    text = json.dumps(value).encode()
    if group is None:
        return [json.loads(text)]
    sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(group.size())]
    dist.all_gather(sizes, torch.tensor([len(text)]), group=group)
    counts = [int(size) for size in sizes]
    mine = torch.zeros(max(counts), dtype=torch.uint8)
    mine[: len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    found = [torch.empty_like(mine) for _ in counts]
    dist.all_gather(found, mine, group=group)
    return [json.loads(data[:count].numpy().tobytes()) for data, count in zip(found, counts, strict=True)]


def from_first(value: Any, group: Group) -> Any:
    """What the first rank of `group` says; the others' values are not looked at."""
    return everyone(value if group is None or group.rank() == 0 else None, group)[0]
