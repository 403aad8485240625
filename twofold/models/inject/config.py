"""InferenceConfig: the settings of `init_inference`, under DeepSpeed's names; free of torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ...core import ConfigError, build

Dtype = Literal["auto", "float32", "bfloat16", "float16", "int8"]
_DTYPES = {
    "fp32": "float32",
    "float": "float32",
    "fp16": "float16",
    "half": "float16",
    "bf16": "bfloat16",
}
# DeepSpeed's keys that ask for what is so here anyway.
_HARMLESS = ("max_out_tokens", "min_out_tokens", "max_tokens", "replace_method", "return_tuple", "triangular_masking")


@dataclass(frozen=True, kw_only=True)
class InferenceConfig:
    """How a model's operations are swapped.

    `dtype` is what weights are kept in ("auto": as they are; "int8": linear weights rounded by row, the rest as it is).
    `tensor_parallel` is how many ranks share attention and feed-forward. Without `replace_with_kernel_inject` nothing
    is swapped but what tensor parallelism needs. `verify` compares the model before and after on a few tokens.

    Raises:
        ConfigError: a value out of range.
    """

    dtype: Dtype = "auto"
    tensor_parallel: int = 1
    replace_with_kernel_inject: bool = True
    verify: bool = True

    def __post_init__(self) -> None:
        if self.tensor_parallel < 1:
            raise ConfigError(f"tensor_parallel must be 1 or more, not {self.tensor_parallel}")


def resolve(config: str | Path | Mapping[str, Any] | None, given: Mapping[str, Any]) -> InferenceConfig:
    """A config (a JSON file or a dict, as DeepSpeed takes) and keywords, which win, as one InferenceConfig.

    Raises:
        ConfigError: an unknown key, or a value of the wrong kind.
    """
    table: dict[str, Any] = {}
    if isinstance(config, str | Path):
        try:
            table = json.loads(Path(config).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"{config} is no JSON file: {error}") from None
    elif config is not None:
        table = dict(config)
    table |= {name: value for name, value in given.items() if value is not None}
    for name in _HARMLESS:
        table.pop(name, None)
    for alias, name in (("kernel_inject", "replace_with_kernel_inject"), ("tp", "tensor_parallel")):
        if alias in table:
            table.setdefault(name, table.pop(alias))
    if "mp_size" in table:
        table.setdefault("tensor_parallel", table.pop("mp_size"))
    if isinstance(degree := table.get("tensor_parallel"), Mapping):
        table["tensor_parallel"] = _degree(degree)
    if "dtype" in table:
        name = str(table["dtype"]).removeprefix("torch.")
        table["dtype"] = _DTYPES.get(name, name)
    return build(InferenceConfig, table)


def _degree(table: Mapping[str, Any]) -> int:
    """DeepSpeed's table `{"enabled": true, "tp_size": 2}`."""
    strange = set(table) - {"enabled", "tp_size"}
    if strange:
        raise ConfigError(f"tensor_parallel has 'tp_size' and 'enabled', not '{min(strange)}'")
    return int(table.get("tp_size", 1)) if table.get("enabled", True) else 1
