"""Platform: the machine as one plain value."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .cores import usable_cores
from .instructions import instruction_sets, processor_name
from .memory import Memory, read_memory


@dataclass(frozen=True, kw_only=True, slots=True)
class Platform:
    """Where tensors live and what this process may use of it.

    `capability` is the widest vector code that torch chose here. `accelerators` are devices that torch sees; this
    version computes on the CPU, so they are told about and not used.
    """

    name: Literal["cpu"]
    device: str
    processor: str
    cores: int
    memory: Memory
    instructions: tuple[str, ...]
    capability: str
    accelerators: tuple[str, ...] = ()


def current() -> Platform:
    """Look at the machine now. Imports torch, so not for `--help`."""
    import torch

    accelerators = tuple(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
    return Platform(
        name="cpu",
        device="cpu",
        processor=processor_name(),
        cores=usable_cores(),
        memory=read_memory(),
        instructions=instruction_sets(),
        capability=torch.backends.cpu.get_cpu_capability(),
        accelerators=accelerators,
    )
