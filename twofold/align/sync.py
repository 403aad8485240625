"""sync: the engine computes with what the trainer has just written, where it was written; nothing is copied.

    trainer.step ──writes──▶ weights ◀──reads── engine.step
                                 │
    sync(decoder, engine, version): every address compared, the cache of older weights forgotten by name,
                                    the program written anew only where something moved

Under ZeRO a rank holds a part of the weights, and rollouts need the whole: `Shared` gathers them for as long as the
engine is awake, says how many bytes came, and has the engine asleep, its cache given back, while the trainer steps.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from torch import Tensor, nn

from ..core import StateError
from ..engine.config import EngineConfig
from ..engine.engine import Engine
from ..models.decoder import Decoder
from ..train.zero import Zero, local


@dataclass(frozen=True, kw_only=True)
class Synced:
    """What it took until the engine had these weights."""

    version: int
    tensors: int
    """Parameters and buffers, each at one address for trainer and engine."""
    nbytes: int
    """What they hold."""
    moved: int = 0
    """Bytes that came from other ranks for it; 0 where every rank has the whole."""
    rewritten: bool = False
    """Whether weights lay elsewhere than before, so that the engine's program was written anew."""
    seconds: float = 0.0


def sync(decoder: Decoder, engine: Engine, version: int) -> Synced:
    """Have the engine go on with the trainer's weights as they are now; requests under way are computed anew.

    Raises:
        StateError: the engine's decoder has memory of its own: such an engine gets its weights by `load_weights`.
        ConfigError: a version below the engine's; the same one says that no weight has changed since.
    """
    started = time.perf_counter()
    apart = different(decoder, engine.decoder)
    if apart:
        raise StateError(
            f"the engine has {len(apart)} tensors of its own ({apart[0]}, ...): build it on the trainer's decoder, or "
            "send it weights with engine.load_weights(named_tensors, version)"
        )
    before = engine.runner.compilations
    if version != engine.version:  # else they are as they were when it had them last
        engine.load_weights(None, version)
    tensors = dict(_tensors(decoder))
    return Synced(
        version=version,
        tensors=len(tensors),
        nbytes=sum(tensor.nbytes for tensor in tensors.values()),
        rewritten=engine.runner.compilations > before,
        seconds=time.perf_counter() - started,
    )


def different(ours: nn.Module, theirs: nn.Module) -> list[str]:
    """Names of the parameters and buffers that are not the same memory in both."""
    one, other = ({name: _place(tensor) for name, tensor in _tensors(module)} for module in (ours, theirs))
    return sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))


class Shared:
    """A trainer's decoder and an engine on it, which take turns.

    `keep_cache` leaves the KV cache's memory with the engine while the trainer steps: for models so small that memory
    is of no concern, and only where ZeRO gathers nothing. The engine is made when it is first needed, with all weights.
    """

    def __init__(
        self, zero: Zero[Decoder], config: EngineConfig, *, eos_ids: tuple[int, ...] = (), keep_cache: bool = False
    ) -> None:
        self.zero, self.config, self.eos_ids = zero, config, eos_ids
        self.keep_cache = keep_cache and not zero.parts
        self.engine: Engine | None = None
        self.last: Synced | None = None
        self.moved = 0
        """Bytes that came from other ranks so far, for all rollouts."""

    @contextmanager
    def awake(self, version: int) -> Iterator[Engine]:
        """The engine with the weights of this moment; a collective, inside of which each rank is on its own.

        Raises:
            ConfigError: a version below the last one; the same one says that no weight has changed since.
        """
        started = time.perf_counter()
        own = {name: local(tensor).numel() for name, tensor in self.zero.decoder.named_parameters()}
        with self.zero.whole() as decoder:
            moved = sum((tensor.numel() - own[name]) * tensor.itemsize for name, tensor in decoder.named_parameters())
            self.moved += moved
            before = self.engine.runner.compilations if self.engine else 0
            engine = self._engine(decoder, version)
            try:
                told = sync(decoder, engine, version)
                rewritten = engine.runner.compilations > before
                self.last = replace(told, moved=moved, rewritten=rewritten, seconds=time.perf_counter() - started)
                yield engine
            finally:
                if not self.keep_cache:
                    engine.sleep()

    def _engine(self, decoder: Decoder, version: int) -> Engine:
        if self.engine is None:
            self.engine = Engine(decoder, self.config, eos_ids=self.eos_ids)
            self.engine.version = version - 1  # what it is about to be given is its first
        self.engine.wake()
        return self.engine


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()


def _place(tensor: Tensor) -> tuple[object, ...]:
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device
