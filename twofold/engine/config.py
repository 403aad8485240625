"""EngineConfig: every dial of the engine, with vLLM's names where vLLM has one; free of torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..core import ConfigError
from ..quant.names import short

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
KvDtype = Literal["auto", "float32", "bfloat16", "int8"]
Policy = Literal["fcfs", "priority"]
Kind = Literal["auto", "generate", "pooling"]
Convert = Literal["none", "embed"]
Tokens = Literal["auto", "last", "mean", "cls"]


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineConfig:
    """How much the engine may hold and do at once.

    `dtype` "auto" keeps a bf16 checkpoint's weights as they are where the CPU kernels widen them, and fp32 otherwise.
    `quantization` names a number format (int8, int4, int4-g64, int4-weight-only, ...) that float weights are rounded to
    while they are loaded. `kv_dtype` is what keys and values are kept in; "auto" is bf16 beside weights narrower than
    fp32. `max_num_batched_tokens` is the token budget of one step: decodes take one each, prompts are cut to fill the
    rest. `num_blocks` wins over `kv_cache_memory_bytes`; with neither, the cache takes what the machine can spare.
    Without `enable_chunked_prefill` prompts are computed whole, before anybody's next token; that is for measuring.
    `max_model_len` None is the model's own context. `scheduling_policy` "priority" serves the lowest number first.
    `seed` makes unseeded requests of one run repeatable; None draws fresh seeds.
    `runner` "pooling" makes vectors and scores and no text, and has no KV cache; "auto" does so for encoders, models
    with a score head in the language head's place, and those with sentence-transformers' modules.json. `convert`
    "embed" lets a model that generates make embeddings too. `pooling` says which tokens a vector is made of; "auto" is
    as the checkpoint says.

    Raises:
        ConfigError: a number out of range, or a token budget that cannot hold one token of every running request.
    """

    dtype: Dtype = "auto"
    quantization: str | None = None
    kv_dtype: KvDtype = "auto"
    device: str = "cpu"
    max_model_len: int | None = None
    max_num_seqs: int = 128
    max_num_batched_tokens: int = 2048
    block_size: int = 16
    num_blocks: int | None = None
    kv_cache_memory_bytes: int | None = None
    enable_prefix_caching: bool = True
    enable_chunked_prefill: bool = True
    scheduling_policy: Policy = "fcfs"
    seed: int | None = None
    runner: Kind = "auto"
    convert: Convert = "none"
    pooling: Tokens = "auto"

    def __post_init__(self) -> None:
        for name, high in (
            ("max_model_len", 2**31 - 1),
            ("max_num_seqs", 65_536),
            ("max_num_batched_tokens", 2**31 - 1),
            ("block_size", 128),
            ("num_blocks", 2**31 - 1),
            ("kv_cache_memory_bytes", 2**63 - 1),
        ):
            value = getattr(self, name)
            if value is not None and not 1 <= value <= high:
                raise ConfigError(f"{name} must be in [1, {high}], not {value}")
        if self.quantization is not None:
            short(self.quantization)
        if self.block_size not in (16, 32, 64, 128):
            raise ConfigError(
                f"block_size must be 16, 32, 64 or 128, which divide attention's steps of 128, not {self.block_size}"
            )
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ConfigError(
                f"max_num_batched_tokens is {self.max_num_batched_tokens}, less than max_num_seqs {self.max_num_seqs}: "
                "every running request needs one token a step; raise the first or lower the second"
            )
        if self.scheduling_policy not in ("fcfs", "priority"):
            raise ConfigError(f"scheduling_policy must be fcfs or priority, not {self.scheduling_policy!r}")
