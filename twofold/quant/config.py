"""Recipe: how a model is quantized, and the text it is calibrated and measured on; free of torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..core import ConfigError
from .names import GROUPS, MEANING, short

Method = Literal["rtn", "gptq", "awq", "smoothquant"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """What to make of a float model, and how to choose its codes.

    Raises:
        ConfigError: a format, group or number that cannot be.
    """

    format: str = "int4"
    """int8, int4, fp8, or a whole name such as int4-g64-asym-weight-only; the next four change parts of it."""
    group: int | None = None
    """Inputs that share a scale: 32, 64, 128, or 0 for all (by default 0 for int8, 32 for int4)."""
    asymmetric: bool = False
    """A zero for each scale, for weights that lean to one side."""
    weight_only: bool = False
    """Activations stay float; else they are rounded to int8 as they come, by row (token) and group."""
    per_tensor: bool = False
    """One scale for a whole matrix, for int8 and fp8."""
    method: Method = "rtn"
    """rtn rounds to nearest; gptq, awq and smoothquant look at what passes through each layer."""
    alpha: float = 0.5
    """SmoothQuant: how much of the outliers moves from activations into weights, 0 to 1."""
    act_order: bool = True
    """GPTQ: round the inputs with most energy first (scales are fixed before)."""
    damp: float = 0.01
    """GPTQ: what is added to the Hessian's diagonal, as a share of its mean."""
    table: bool = True
    """Quantize the head, and an embedding that is the head, to int8; without it, any tool can read a tied model."""

    def __post_init__(self) -> None:
        name = short(self.format)
        meaning = MEANING[name]
        if self.group is not None and self.group not in GROUPS:
            raise ConfigError(f"group must be {', '.join(map(str, GROUPS))}, not {self.group}")
        if not 0.0 <= self.alpha <= 1.0:
            raise ConfigError(f"alpha must be in [0, 1], not {self.alpha}")
        if not 0.0 < self.damp <= 1.0:
            raise ConfigError(f"damp must be in (0, 1], not {self.damp}")
        if meaning.kind == "int4" and self.per_tensor:
            raise ConfigError("one scale for a whole matrix is too coarse for int4: use int8 or fp8")
        if meaning.kind == "fp8" and (self.asymmetric or self.method == "smoothquant"):
            raise ConfigError("fp8 has no zeros, and activations stay float: leave asymmetric and smoothquant out")
        if (self.per_tensor or meaning.tensor) and self.group:
            raise ConfigError("one scale for a whole matrix leaves no groups: give per_tensor or group")
        if meaning.kind == "int4" and self.method == "smoothquant":
            raise ConfigError("smoothquant moves outliers into weights, which int4 cannot hold: use awq or gptq")
        if self.weight_only and self.method == "smoothquant":
            raise ConfigError("smoothquant serves rounded activations, and weight-only has none: use awq or gptq")

    @property
    def name(self) -> str:
        """The whole name of the layers' format."""
        meaning = MEANING[short(self.format)]
        tensor = self.per_tensor or meaning.tensor
        return meaning._replace(
            group=0 if tensor else meaning.group if self.group is None else self.group,
            symmetric=meaning.symmetric and not self.asymmetric,
            dynamic=meaning.dynamic and not self.weight_only,
            tensor=tensor,
        ).name


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """What a model reads while it is quantized.

    Raises:
        ConfigError: a number out of range.
    """

    calibrate: str = "python-stdlib"
    """Text to calibrate on: a file, a folder, JSONL, a named source, or the text itself."""
    calibrate_tokens: int = 8192
    """How much of it passes through each layer; 0 rounds to nearest without looking at inputs."""
    eval_tokens: int = 8192
    """Held-out tokens that perplexity is measured on, before and after; 0 measures nothing."""
    seq_len: int = 512
    """The longest piece of a document, in tokens."""
    seed: int = 0
    """Which pieces are read."""

    def __post_init__(self) -> None:
        for name, least in (("calibrate_tokens", 0), ("eval_tokens", 0), ("seq_len", 2), ("seed", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} must be {least} or more, not {getattr(self, name)}")
