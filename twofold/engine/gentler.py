"""Settings that need less memory, from the gentlest change to the harshest, in the words of their flags."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from .config import EngineConfig

if TYPE_CHECKING:
    from .capacity import Forecast


def gentler(
    settings: EngineConfig, found: Forecast, memory: int, rounds: bool = False
) -> list[tuple[EngineConfig, str]]:
    """Settings that need less, each with the flags that say so; `rounds` says that weights may still be quantized."""
    ways: list[tuple[EngineConfig, str]] = []

    def way(**changes: int | str) -> None:
        flags = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in changes.items())
        unset: dict[str, None] = {}
        if settings.num_blocks is not None or settings.kv_cache_memory_bytes is not None:
            unset = {"num_blocks": None, "kv_cache_memory_bytes": None}
            flags = f"leave out --num-blocks and --kv-cache-memory-bytes, {flags}" if flags else "leave them out"
        ways.append((replace(settings, **unset, **changes), flags))  # type: ignore[arg-type]

    if settings.num_blocks is not None or settings.kv_cache_memory_bytes is not None:
        ways.append(
            (
                replace(settings, num_blocks=None, kv_cache_memory_bytes=None),
                "leave out --num-blocks and --kv-cache-memory-bytes, and the cache takes what fits",
            )
        )
    left = memory - found.runtime - found.weights - found.activations
    longest = left // max(1, found.kv_per_token * settings.block_size) * settings.block_size
    if 64 <= longest < found.wanted:
        way(max_model_len=longest)
    lengths = [length for length in _halves(found.wanted) if length >= 64]
    for tokens in _halves(settings.max_num_batched_tokens):
        slots = min(settings.max_num_seqs, tokens)
        way(max_num_batched_tokens=tokens, max_num_seqs=slots)
    for tokens in _halves(settings.max_num_batched_tokens):
        for length in lengths:
            way(max_model_len=length, max_num_batched_tokens=tokens, max_num_seqs=min(settings.max_num_seqs, tokens))
    if settings.dtype in ("auto", "float32"):
        way(dtype="bfloat16")
        way(dtype="bfloat16", max_num_batched_tokens=64, max_num_seqs=min(settings.max_num_seqs, 16))
        way(
            dtype="bfloat16",
            max_model_len=min(found.wanted, 64),
            max_num_batched_tokens=16,
            max_num_seqs=min(settings.max_num_seqs, 4),
        )
    for name in ("int8", "int4") if rounds else ():
        way(quantization=name)
        way(quantization=name, max_num_batched_tokens=64, max_num_seqs=min(settings.max_num_seqs, 16))
    if settings.weights == "resident" and settings.device == "cpu":
        way(weights="stream")
        way(weights="stream", max_num_batched_tokens=64, max_num_seqs=min(settings.max_num_seqs, 64))
        way(
            weights="stream",
            max_model_len=min(found.wanted, 64),
            max_num_batched_tokens=16,
            max_num_seqs=min(settings.max_num_seqs, 4),
        )
    return ways


def _halves(start: int) -> list[int]:
    """start/2, start/4, ... down to 16, as powers of two where `start` is one."""
    found = []
    while start > 16:
        start = max(16, start // 2)
        found.append(start)
    return found
