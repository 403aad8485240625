"""RemoteConfig: what there is to say about an engine in a process of its own; free of torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..core import ConfigError

Transport = Literal["shared", "gloo"]


@dataclass(frozen=True, kw_only=True)
class RemoteConfig:
    """How a generator is started, how weights come to it, and how long it may be silent.

    Raises:
        ConfigError: a number out of range, or shared memory with another machine.
    """

    transport: Transport = "shared"
    """What buckets travel through: memory that both processes of this machine have, or gloo, which crosses machines."""
    bucket_mb: float = 16
    """MiB of weights that travel at once, at most, but for a larger tensor: while one is packed another is unpacked."""
    threads: int = 0
    """Threads that the generator computes with; 0: as many as Twofold takes on this machine."""
    patience: float = 20.0
    """Seconds without a sign of life after which the generator is thought dead."""
    step_limit: float = 300.0
    """Seconds that one step may take."""
    start_limit: float = 300.0
    """Seconds until the engine must stand; kernels may have to be built."""
    launcher: tuple[str, ...] = ()
    """Words before the command, e.g. ["ssh", "host"]: the generator talks over its standard input and output."""
    python: str = ""
    """The interpreter; "" is this one."""
    address: str = ""
    """The name of this machine that the generator's machine finds it by; "" when it is the same one."""

    def __post_init__(self) -> None:
        if self.transport not in ("shared", "gloo"):
            raise ConfigError(f'transport must be "shared" or "gloo", not {self.transport!r}')
        for name in ("bucket_mb", "patience", "step_limit", "start_limit"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be above 0, not {getattr(self, name)}")
        if self.threads < 0:
            raise ConfigError(f"threads must be 0 (as many as fit) or more, not {self.threads}")
        if self.address and self.transport == "shared":
            raise ConfigError('two machines share no memory: set transport to "gloo", or leave address out')
