"""EngineConfig: every dial of the engine, with vLLM's names where vLLM has one; free of torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from ..core import ConfigError
from ..quant.names import short

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
KvDtype = Literal["auto", "float32", "bfloat16", "int8", "fp8"]
Policy = Literal["fcfs", "priority"]
Kind = Literal["auto", "generate", "pooling"]
Convert = Literal["none", "embed"]
Tokens = Literal["auto", "last", "mean", "cls"]
Method = Literal["ngram", "suffix", "draft_model", "eagle"]
Weights = Literal["resident", "stream"]

QUEUED = 192 << 20
"""Bytes of blocks that wait to be written to a disk, or were read and are not in the cache yet, at most."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SpeculativeConfig:
    """How next tokens are guessed at, so that one step may decide several; the text stays the same to the bit.

    Raises:
        ConfigError: a number out of range, or a method without its model.
    """

    method: Method | None = None
    """Who guesses: the request's own text, that and other requests' outputs, a smaller model, or a head that goes on
    with the model's hidden states; nobody without it."""
    num_speculative_tokens: int = 16
    """Guessed tokens of one request in one step, at most."""
    adaptive: bool = True
    """Choose the number by how often guesses are right and what a longer step costs; otherwise always send all."""
    prompt_lookup_min: int = 1
    """ngram: the fewest last tokens that must have stood somewhere before."""
    prompt_lookup_max: int = 5
    """ngram: the most that are compared."""
    suffix_decoding_max_tree_depth: int = 24
    """suffix: the most last tokens that are compared."""
    suffix_decoding_max_cached_requests: int = 10_000
    """suffix: how many ended requests' outputs are looked at, 0 for none."""
    suffix_decoding_min_token_prob: float = 0.1
    """suffix: the share of the places found that must agree with all of a guess."""
    model: str | None = None
    """draft_model: directory of a smaller checkpoint with the same tokenizer. eagle: of a head for this very model."""
    dtype: Dtype = "auto"
    """draft_model, eagle: what its weights are kept in."""
    quantization: str | None = None
    """draft_model: a number format that its float weights are rounded to."""

    def __post_init__(self) -> None:
        for name, low, high in (
            ("num_speculative_tokens", 1, 256),
            ("prompt_lookup_min", 1, 64),
            ("prompt_lookup_max", self.prompt_lookup_min, 64),
            ("suffix_decoding_max_tree_depth", 2, 256),
            ("suffix_decoding_max_cached_requests", 0, 2**31 - 1),
            ("suffix_decoding_min_token_prob", 0.0, 1.0),
        ):
            value = getattr(self, name)
            if not low <= value <= high:
                raise ConfigError(f"speculative.{name} must be in [{low:g}, {high:g}], not {value}")
        if (self.method in ("draft_model", "eagle")) is not (self.model is not None):
            method = self.method if self.method == "eagle" else "draft_model"
            raise ConfigError(f"speculative.method {method} and speculative.model go together: give both or neither")
        if self.method == "eagle" and self.quantization is not None:
            raise ConfigError("speculative.quantization is for draft_model: a draft head is small, leave it out")


_JSON = {"flag": "speculative-config", "example": '{"method": "ngram", "num_speculative_tokens": 8}'}


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineConfig:
    """How much the engine may hold and do at once.

    `dtype` "auto" keeps a bf16 checkpoint's weights as they are where the CPU kernels widen them, and fp32 otherwise.
    `quantization` names a number format (int8, int4, int4-g64, int4-weight-only, ...) that float weights are rounded to
    while they are loaded. `kv_dtype` is what keys and values are kept in, int8 and fp8 (e4m3) with a scale for each
    token and head; "auto" is bf16 beside weights narrower than fp32. `max_num_batched_tokens` is the token budget of
    one step: decodes take one each, prompts are cut to fill the rest. `num_blocks` wins over `kv_cache_memory_bytes`;
    with neither, the cache takes what the machine can spare.
    Without `enable_chunked_prefill` prompts are computed whole, before anybody's next token; that is for measuring.
    `max_model_len` None is the model's own context. `scheduling_policy` "priority" serves the lowest number first.
    `enable_lora` lets requests name adapters: `max_loras` different ones in a step, each of rank `max_lora_rank` at
    most; in memory are at most `lora_cache_bytes` of them, and `max_cpu_loras` where that is given.
    `weights` "stream" keeps as many layers in memory as `weights_memory_bytes` hold, two at least, and reads the others
    from disk in every step; without the number they take half of what is left beside the cache. They are read from a
    file in `offload_dir`, which is made of the checkpoint at the first start (~/.cache/twofold/weights by default).
    `kv_host_bytes` of host memory keep blocks of the cache that it had no more room for, `kv_offload_dir` names a
    directory where blocks outlive the process, `kv_offload_bytes` of them at most (docs/kv_tiers.md).
    `seed` makes unseeded requests of one run repeatable; None draws fresh seeds. `speculative` says who guesses at the
    next tokens.
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
    enable_lora: bool = False
    max_loras: int = 8
    max_lora_rank: int = 64
    max_cpu_loras: int | None = None
    lora_cache_bytes: int = 256 << 20
    weights: Weights = "resident"
    weights_memory_bytes: int | None = None
    offload_dir: str | None = None
    kv_host_bytes: int | None = None
    kv_offload_dir: str | None = None
    kv_offload_bytes: int = 16 << 30
    seed: int | None = None
    speculative: SpeculativeConfig = field(default=SpeculativeConfig(), metadata=_JSON)
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
            ("max_loras", 1024),
            ("max_lora_rank", 4096),
            ("max_cpu_loras", 2**31 - 1),
            ("lora_cache_bytes", 2**63 - 1),
            ("weights_memory_bytes", 2**63 - 1),
            ("kv_host_bytes", 2**63 - 1),
            ("kv_offload_bytes", 2**63 - 1),
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
        if self.max_cpu_loras is not None and self.max_cpu_loras < self.max_loras:
            raise ConfigError(f"max_cpu_loras is {self.max_cpu_loras}, less than max_loras {self.max_loras}: raise it")
        if self.weights == "resident" and (self.weights_memory_bytes is not None or self.offload_dir is not None):
            raise ConfigError("weights_memory_bytes and offload_dir are for streamed weights: add weights stream")
        if self.weights == "stream" and self.device != "cpu":
            raise ConfigError(f"weights are streamed on the cpu, not on {self.device}: leave weights stream out")
        tier = "kv_host_bytes" if self.kv_host_bytes is not None else "kv_offload_dir" if self.kv_offload_dir else ""
        if tier and not self.enable_prefix_caching:
            raise ConfigError(f"{tier} keeps blocks to be found again, without enable_prefix_caching none is: drop one")
        if tier and self.runner == "pooling":
            raise ConfigError(f"{tier} is for a KV cache, and pooling has none: leave it out")
        if self.scheduling_policy not in ("fcfs", "priority"):
            raise ConfigError(f"scheduling_policy must be fcfs or priority, not {self.scheduling_policy!r}")

    @property
    def tier_bytes(self) -> int:
        """Of the memory that weights and cache take, what the tiers behind the cache take too."""
        if self.device != "cpu":
            return 0
        return (self.kv_host_bytes or 0) + (QUEUED if self.kv_offload_dir else 0)
