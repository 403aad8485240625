"""What a recipe may say about many processes: one field an axis."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..core import ConfigError


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How the ranks of a run divide the work. Alone, every field is its default and nothing is divided."""

    dp: int | Literal["auto"] = "auto"
    """Ranks that read different sequences; "auto" is what the other axes leave."""
    zero: Literal[0, 1, 2, 3, "hybrid", "auto"] = "auto"
    """What data-parallel ranks share: 1 optimizer states, 2 gradients too, 3 parameters too; "hybrid" is 3 within a
    node and a copy on each (Rajbhandari et al. 2020; Zhang et al. 2022); "auto" is the least that fits."""
    node: int | None = None
    """Ranks of a node, for "hybrid"; left out, what the launcher says."""
    tp: int = 1
    """Tensor parallel: ranks that hold a part of every matrix (Shoeybi et al. 2019)."""
    sequence: bool = False
    """Between the matrices of tensor parallel ranks, each keeps its part of the tokens (Korthikanti et al. 2022)."""
    sp: int = 1
    """Sequence parallel: ranks that hold a part of every sequence."""
    sp_kind: Literal["ulysses", "ring"] = "ulysses"
    """How they attend: exchange heads for tokens (Jacobs et al. 2023) or pass keys and values on (Liu et al. 2023)."""
    pp: int = 1
    """Pipeline parallel: ranks that hold a part of the layers."""
    pp_schedule: Literal["gpipe", "1f1b", "interleaved", "zero_bubble"] = "1f1b"
    """The order of forwards and backwards on a stage."""
    pp_stages: int = 1
    """Stages that each rank holds; "interleaved" and "zero_bubble" want two or more."""
    ep: int = 1
    """Expert parallel: of the ranks that share parameters, those with different experts (Lepikhin et al. 2020)."""
    comm: Literal["plain", "int8", "int4", "onebit"] = "plain"
    """How gathered parameters and reduced gradients travel (Wang et al. 2023; Tang et al. 2021)."""
    comm_warmup: int = 100
    """Reductions of each layer that travel whole before "onebit" begins, while gradients are still wild; set
    optimizer.freeze_step to as many steps."""
    timeout: float = 600.0
    """Seconds that a collective may take before the run says who is missing."""

    def __post_init__(self) -> None:
        for name in ("dp", "tp", "sp", "pp", "ep", "pp_stages", "node"):
            value = getattr(self, name)
            if isinstance(value, int) and value < 1:
                raise ConfigError(f"parallel.{name} must be 1 or more, not {value}")
        if self.timeout <= 0:
            raise ConfigError(f"parallel.timeout must be more than 0 seconds, not {self.timeout}")
        if self.sequence and self.tp == 1:
            raise ConfigError(
                "parallel.sequence divides tokens among tensor parallel ranks: set parallel.tp to 2 or more"
            )
