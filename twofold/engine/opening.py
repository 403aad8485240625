"""A checkpoint's decoder as the settings ask for it: whole in memory, or with layers that are streamed from a file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from ..core.cache import cache_folder, cache_root
from ..models.decoder import Decoder
from ..models.sections import sections
from ..models.spec import ModelSpec
from ..models.streamed import load_streamed
from ..models.streaming import kept_layers, least_bytes
from ..models.weights import load, read_formats, read_spec
from ..quant.format import Format
from .capacity import DTYPES, empty_decoder, forecast
from .config import EngineConfig

SHARE = 0.5


def open_decoder(folder: str | Path, config: EngineConfig, memory: int) -> Decoder:
    """Load the decoder that `config` (as `capacity.resolve` decided it) asks for into `memory` bytes that are free.

    Raises:
        CapacityError: it does not fit; told before anything is loaded, with what would.
        CheckpointError, ConfigError: as `models.load`.
    """
    folder = Path(folder)
    formats, spec = read_formats(folder, config.quantization), read_spec(folder)
    config = budgeted(spec, config, memory, formats)
    forecast(spec, config, memory, formats=formats).require()
    dtype = DTYPES[config.dtype]
    if config.weights == "stream":
        assert config.weights_memory_bytes is not None, "budgeted decides it"
        return load_streamed(
            folder,
            dtype=dtype,
            max_len=config.max_model_len,
            quantization=config.quantization,
            budget=config.weights_memory_bytes,
            directory=offload_dir(config) if config.offload_dir else cache_folder("weights"),
        )
    return load(
        folder, dtype=dtype, device=config.device, max_len=config.max_model_len, quantization=config.quantization
    )


def offload_dir(config: EngineConfig) -> Path:
    """Where files of streamed weights are."""
    return Path(config.offload_dir).expanduser() if config.offload_dir else cache_root() / "weights"


def streamed(spec: ModelSpec, config: EngineConfig, formats: Mapping[str, Format]) -> tuple[int, int]:
    """How many layers stay in memory, and the bytes that each step reads, of settings that `budgeted` decided."""
    found = sections(empty_decoder(spec, DTYPES[config.dtype], formats or config.quantization))
    kept = kept_layers(found, config.weights_memory_bytes or least_bytes(found))
    return len(kept), sum(section.nbytes for number, section in enumerate(found[1:]) if number not in kept)


def budgeted(spec: ModelSpec, config: EngineConfig, memory: int, formats: Mapping[str, Format]) -> EngineConfig:
    """The settings with `weights_memory_bytes` decided where layers are streamed and nobody said it.

    It is two layers, and half of what is then left beside the KV cache and a step.
    """
    if config.weights != "stream" or config.weights_memory_bytes is not None:
        return config
    found = sections(empty_decoder(spec, DTYPES[config.dtype], formats or config.quantization))
    least = replace(config, weights_memory_bytes=max(least_bytes(found), 1))
    spare = memory - forecast(spec, least, memory, formats=formats).total
    layers = sum(section.nbytes for section in found[1:])
    assert least.weights_memory_bytes is not None
    return replace(
        config, weights_memory_bytes=min(max(layers, 1), least.weights_memory_bytes + max(0, int(spare * SHARE)))
    )
