"""Where a run keeps what it is not working on: the recipe's [offload] table, free of torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..core import ConfigError

Place = Literal["none", "host", "disk"]


@dataclass(frozen=True, kw_only=True)
class OffloadConfig:
    """ZeRO-Offload and ZeRO-Infinity. "none": beside the weights in use; "host": this machine's memory; "disk": files.

    Where a run keeps its numbers changes none of them, so it may go on with another table than it began with. On a
    machine without a device the host's memory is where all is anyway, and only "disk" saves any.
    """

    optimizer: Place = "none"
    """The optimizer's states, and the fp32 masters of a run whose weights are narrower."""
    gradients: Place = "none"
    """Summed in fp32 as soon as the backward pass has each, its own copy freed."""
    parameters: Place = "none"
    """A layer's weights come when it is run, forward or backward, and go after it."""
    directory: Path | None = None
    """Where the files are, on a fast disk; left out, the run's output. They have no names and end with the process."""
    tile: int = 16 << 20
    """Bytes that the optimizer works on at once, of all that is on disk; it holds `tile` times `buffers`."""
    buffers: int = 3
    """Tiles in memory: the one worked on, and those read ahead."""
    cache: bool = True
    """Whether the system may keep the files' pages in memory it can spare; false has each step wait for the disk."""

    def __post_init__(self) -> None:
        for name, least in (("tile", 1 << 20), ("buffers", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"offload.{name} must be {least} or more, not {getattr(self, name)}")

    @property
    def places(self) -> tuple[Place, Place, Place]:
        return self.optimizer, self.gradients, self.parameters
