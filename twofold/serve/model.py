"""What the model's process loads: the sum of bytes first, then the decoder, then the engine around it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from ..core import build
from ..engine.adapters import AdapterPool
from ..engine.capacity import resolve
from ..engine.config import EngineConfig
from ..engine.engine import Engine, open_engine
from ..engine.opening import open_decoder
from ..engine.pooling import TEXTS, PoolingEngine
from ..engine.stats import EngineStats
from ..kernels.op import check_names
from ..platforms import read_memory
from . import wire
from .worker import Verb


class LoadedModel:
    """An engine that is ready to step, and what the front must know of it."""

    def __init__(self, engine: Engine | PoolingEngine) -> None:
        self.engine = engine
        self.verbs: Mapping[str, Verb] = verbs_of(engine.adapters) if isinstance(engine, Engine) else {}
        limits, config = engine.limits, engine.config
        self.ready = wire.Ready(
            max_len=limits.max_model_len,
            vocab_size=limits.vocab,
            max_running=config.max_num_seqs if engine.abilities.generates else max(config.max_num_seqs, TEXTS),
            block_size=config.block_size,
            blocks=limits.cache_tokens // config.block_size,
            abilities=engine.abilities,
        )

    def stats(self) -> EngineStats:
        return self.engine.stats()

    def close(self) -> None:
        """Let what was computed reach the disk, where the settings name one."""
        if isinstance(self.engine, Engine):
            self.engine.close()


def verbs_of(adapters: AdapterPool) -> dict[str, Verb]:
    """What the front may ask of an engine's adapters."""

    def load_adapter(
        name: str, path: str, key: str | None = None, replace: bool = False, listed: bool = True
    ) -> dict[str, Any]:
        return msgspec.structs.asdict(adapters.load(name, path, key, replace=replace, listed=listed))

    def unload_adapter(key: str) -> dict[str, Any]:
        adapters.unload(key)
        return {}

    return {"load_adapter": load_adapter, "unload_adapter": unload_adapter}


def load_model(start: wire.Start) -> LoadedModel:
    """Load the checkpoint that `start` names.

    Raises:
        CheckpointError: it cannot be read.
        ConfigError: TWOFOLD_KERNELS names an op or an implementation that is not there.
        CapacityError: it does not fit this machine, found before anything is loaded; the message says what would.
    """
    check_names()
    settings: dict[str, Any] = start.engine
    config = resolve(build(EngineConfig, settings, "engine."), start.model)
    decoder = open_decoder(start.model, config, read_memory().available)
    return LoadedModel(open_engine(decoder, config, start.model, eos_ids=start.eos_ids))
