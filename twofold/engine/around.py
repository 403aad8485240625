"""What the settings want around an engine: who guesses, what lies behind the cache, and how large that is."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ..core import ConfigError
from ..models.decoder import Decoder
from ..platforms import free_on
from .blocks import BlockPool
from .capacity import forecast, kv_dtype_of
from .config import EngineConfig
from .contents import BlockContents
from .disk_tier import DiskTier
from .draft import draft_model
from .eagle import eagle
from .identity import identity
from .paged import KVCache
from .proposer import Proposer
from .speculation import Speculation, lookup
from .tiers import HostTier, Tier, Tiers


def context_for(decoder: Decoder, config: EngineConfig) -> int:
    """The context of an engine.

    Raises:
        ConfigError: longer than the decoder was built for, or than one step where prompts are not cut; or weights that
            should be streamed, and are not.
    """
    if config.weights == "stream" and decoder.stream is None:
        raise ConfigError("weights stream: this decoder's weights are in memory; stream them where it is loaded")
    max_model_len = config.max_model_len or decoder.max_len
    if max_model_len > decoder.max_len:
        raise ConfigError(f"max_model_len is {max_model_len}; this decoder was built for {decoder.max_len} at most")
    if not config.enable_chunked_prefill and config.max_num_batched_tokens < max_model_len:
        raise ConfigError(
            f"max_num_batched_tokens is {config.max_num_batched_tokens}: without enable_chunked_prefill a prompt "
            f"of {max_model_len} tokens must fit one step; raise the first or lower max_model_len"
        )
    return max_model_len


def speculation_for(
    decoder: Decoder, config: EngineConfig, folder: str | Path | None, *, num_blocks: int, eos_ids: tuple[int, ...]
) -> Speculation | None:
    """Whoever the settings name to guess at tokens, None when nobody is to; `folder` is the checkpoint's."""
    wanted = config.speculative
    if wanted.method is None:
        return None
    if wanted.method == "draft_model":
        proposer: Proposer = draft_model(decoder, config, num_blocks=num_blocks, eos_ids=eos_ids)
    elif wanted.method == "eagle":
        proposer = eagle(decoder, config, folder, num_blocks=num_blocks, eos_ids=eos_ids)
    else:
        proposer = lookup(wanted)
    return Speculation(proposer, most=wanted.num_speculative_tokens, adaptive=wanted.adaptive)


def tiers_for(decoder: Decoder, config: EngineConfig, pool: BlockPool, contents: BlockContents) -> Tiers | None:
    """The tiers that the settings ask for behind a pool, nearest first; None without any."""
    tiers: list[Tier] = []
    if config.kv_host_bytes is not None:
        tiers.append(HostTier(config.kv_host_bytes))
    if config.kv_offload_dir:
        who = identity(decoder, contents.about)
        size, most = contents.nbytes, config.kv_offload_bytes
        tiers.append(DiskTier(config.kv_offload_dir, identity=who, block_bytes=size, most_bytes=most))
    return Tiers(pool, contents, tiers) if tiers else None


def num_blocks_for(decoder: Decoder, config: EngineConfig) -> int:
    """How many blocks the cache has: as said, or as many as the machine can spare beside the weights."""
    if config.num_blocks is not None:
        return config.num_blocks
    if config.kv_cache_memory_bytes is not None:
        per_block = KVCache.bytes_per_block(
            decoder.spec, config.block_size, kv_dtype_of(config.kv_dtype, decoder.dtype)
        )
        blocks = config.kv_cache_memory_bytes // per_block
        if blocks < 1:
            raise ConfigError(
                f"kv_cache_memory_bytes is {config.kv_cache_memory_bytes}, less than one block of {per_block} bytes: "
                "give more, or leave it out"
            )
        return blocks
    held = replace(config, dtype=str(decoder.dtype).removeprefix("torch."))  # type: ignore[arg-type]
    return forecast(decoder.spec, held, free_on(str(decoder.device)), loaded=True).require().blocks
