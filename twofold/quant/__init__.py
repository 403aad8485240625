"""Number formats and how to reach them. Needs no model: what calibrates takes any module.

names.py   the formats' names, free of torch
format.py  Format: its bytes, arithmetic, panels and cuts
codes.py   Quantized: codes, scales and zeros, and how they are chosen
linear.py  QuantLinear: a layer whose weight is kept in panels
stored.py  Stored: how a quantized weight lies in a checkpoint
compressed.py  as compressed-tensors has them: read and written
words.py   as GPTQ's and AWQ's tools have them
blocks.py  as GGUF has them, in blocks
fp8.py     e4m3 numbers with scales
disk.py    what a checkpoint says of its own quantization
config.py  Recipe: how a model is quantized
calibrate.py  a model quantized layer by layer on real text
observe.py what passes through a layer
gptq.py    GPTQ: inputs still to come make up for the error of those before
scaling.py AWQ and SmoothQuant: scales moved between layers
"""

from typing import TYPE_CHECKING, Any

from .names import short

if TYPE_CHECKING:
    from .codes import Quantized
    from .format import FORMATS, Format, named
    from .linear import QuantLinear

__all__ = ["FORMATS", "Format", "QuantLinear", "Quantized", "named", "short"]

_HOMES = {"FORMATS": "format", "Format": "format", "QuantLinear": "linear", "Quantized": "codes", "named": "format"}


def __getattr__(name: str) -> Any:
    """All but the names needs torch, and whoever only checks a setting does not wait for it."""
    from importlib import import_module

    if name in _HOMES:
        return getattr(import_module("." + _HOMES[name], __name__), name)
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
