"""What a checkpoint says of its own quantization, whoever's words it uses: `quantization_config` by its method.

Shapes: none.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from ..core import CheckpointError, unknown
from .blocks import gguf_config
from .compressed import compressed_config
from .fp8 import fp8_config
from .stored import Find, Stored
from .words import awq_config, gptq_config

METHODS = ("compressed-tensors", "gptq", "awq", "fp8", "fbgemm_fp8", "gguf")
CACHE_SCALES = (".k_scale", ".v_scale", ".q_scale", ".prob_scale", ".k_zero_point", ".v_zero_point")
"""Behind attention's name: scales for keys and values, which ours do not need, being scaled token by token."""


def nothing(name: str) -> Tensor | None:
    """A checkpoint without tensors, for whoever looks at settings alone."""
    return None


def stored_weights(
    told: Mapping[str, Any], modules: Iterable[str], find: Find = nothing
) -> tuple[dict[str, Stored], Stored | None]:
    """How each of these linear modules lies on disk that is quantized, and the embedding where it is.

    Raises:
        CheckpointError: another method, or a setting that Twofold does not build, named.
    """
    method = told.get("quant_method")
    if method == "compressed-tensors":
        found, embedding = compressed_config(told, modules, find)
        return dict(found), embedding
    if method == "gptq":
        return dict(gptq_config(told, modules, find)), None
    if method == "awq":
        return dict(awq_config(told, modules, find)), None
    if method in ("fp8", "fbgemm_fp8"):
        return dict(fp8_config(told, modules, find)), None
    if method == "gguf":
        blocks, table = gguf_config(told, modules, find)
        return dict(blocks), table
    raise CheckpointError(
        f"config.json: quantization_config has 'quant_method': {method!r}; " + unknown("method", str(method), METHODS)
    )
