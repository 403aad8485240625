"""`twofold plan`: what a model needs and what fits this machine, before anything is loaded."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from ..engine.capacity import Forecast, forecast, resolve
from ..engine.config import EngineConfig
from ..engine.opening import budgeted, offload_dir, streamed
from ..models.gguf.tensors import LINK
from ..models.spec import ModelSpec
from ..models.weights import read_formats, read_spec
from ..platforms import read_memory
from ..quant.format import Format
from .bytes import human


def plan(model: Path, settings: EngineConfig) -> int:
    """Print the sum; exit code 0 when it fits, 1 when it does not (with the fix)."""
    spec, memory, settings = read_spec(model), read_memory(), resolve(settings, model)
    formats = read_formats(model, settings.quantization)
    settings = budgeted(spec, settings, memory.available, formats)
    found = forecast(spec, settings, memory.available, formats=formats)
    print(f"model         {model} ({spec.architecture}, {len(spec.layers)} layers, context {spec.max_len})")
    print(f"checkpoint    {human(checkpoint_bytes(model))} on disk")
    print(f"memory        {human(memory.available)} free of {human(memory.total)}; limit: {memory.limit}")
    for name, value in (*lines(spec, settings, found, formats), *streaming(spec, settings, formats)):
        print(f"{name:<14}{value}")
    print(f"fits          {'yes' if found.fits else 'no: ' + found.fix}")
    return 0 if found.fits else 1


def lines(
    spec: ModelSpec, settings: EngineConfig, found: Forecast, formats: Mapping[str, Format]
) -> list[tuple[str, str]]:
    """Name and value of each part of the sum."""
    kept = ", ".join([*dict.fromkeys(format.name for format in formats.values()), settings.dtype])
    said = [
        ("runtime", f"{human(found.runtime)} (interpreter, torch, server)"),
        ("weights", f"{human(found.weights)} as {kept}"),
        ("activations", f"at most {human(found.activations)} in a step of {settings.max_num_batched_tokens} tokens"),
    ]
    if found.pooling:
        said += [("pooling", f"whole texts of at most {found.wanted} tokens, without a KV cache")]
        return [*said, ("total", f"{human(found.total)}")]
    whole = found.kv_per_token * found.wanted
    said += [("KV cache", f"{human(found.kv_per_token)} a token, {human(whole)} a full context")]
    if found.blocks:
        held = found.blocks * found.block_size
        said += [
            ("blocks", f"{found.blocks} of {found.block_size} tokens: {held} tokens, {human(found.kv_bytes)}"),
            ("context", f"{found.context} tokens" + ("" if found.context == spec.max_len else f" of {spec.max_len}")),
            ("concurrency", f"{min(found.concurrency, settings.max_num_seqs)} requests of that length at once"),
        ]
    return [*said, ("total", f"{human(found.total)}")]


def streaming(spec: ModelSpec, settings: EngineConfig, formats: Mapping[str, Format]) -> list[tuple[str, str]]:
    """What is read from disk in every step, where layers are streamed."""
    if settings.weights != "stream":
        return []
    stay, read = streamed(spec, settings, formats)
    passing = f"{human(read)} read from {offload_dir(settings)} in every step" if read else "nothing is read in a step"
    return [("streamed", f"{stay} of {len(spec.layers)} layers stay in memory, {passing}")]


def checkpoint_bytes(model: Path) -> int:
    """Bytes of the tensors in a checkpoint's safetensors files, from their headers; or of its GGUF file."""
    linked = model / LINK
    total = linked.stat().st_size if linked.is_file() else 0
    for path in sorted(model.glob("*.safetensors")):
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size)) if size < 2**27 else {}
        total += max((entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"), default=0)
    return total
