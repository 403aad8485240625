"""Engine: requests become tokens. Five verbs, used alike by the server, by `LLM`, and by alignment:

    engine.submit(request); engine.abort(id); engine.step()
    engine.load_weights(named_tensors, version); engine.sleep() / engine.wake()

A step is plan, execute, apply; everything else is somebody's business below. Not for use by several threads at once.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import msgspec
from torch import Tensor

from ..core import ConfigError, RequestError, StateError
from ..models.adapters import Slots
from ..models.decoder import Decoder
from ..models.streaming import StreamError, refuse_new_weights
from ..models.weights import load_tensors
from .adapters import AdapterPool
from .around import context_for, num_blocks_for, speculation_for, tiers_for
from .blocks import BlockPool
from .capacity import kv_dtype_of
from .config import EngineConfig
from .contents import BlockContents
from .facts import Waits
from .grammar.masks import Grammars
from .limits import Limits
from .plan import ChunkResult, StepPlan, StepResult
from .pooler import Pooler
from .pooling import PoolingEngine
from .request import Output, Request
from .runner import Runner
from .scheduler import Scheduler
from .speculation import watched
from .stats import EngineStats
from .vectors import NO_POOLING, Abilities

LOAD_SECONDS = 0.05  # for a tier, when there is nothing else to do but hear who comes and goes


class Engine:
    """One decoder, its KV cache, and the requests that are using them.

    `eos_ids` are the ids that end a text unless a request ignores them. `tokenizer` is the folder of the checkpoint's,
    which only structured outputs need: without it they are refused. `config.dtype` and `config.device` are for
    whoever loads the decoder: the cache has the decoder's. With a `pooler` requests for vectors are served too, in
    steps that they share.

    Raises:
        ConfigError: a context longer than the decoder was built for, or a reward model, which makes no text.
        CapacityError: the KV cache does not fit this machine; the message says what would.
    """

    def __init__(
        self,
        decoder: Decoder,
        config: EngineConfig,
        *,
        eos_ids: tuple[int, ...] = (),
        tokenizer: str | Path | None = None,
        pooler: Pooler | None = None,
    ) -> None:
        decoder.spec.speaking()
        max_model_len = context_for(decoder, config)
        blocks = num_blocks_for(decoder, replace(config, max_model_len=max_model_len))
        self.speculation = speculation_for(decoder, config, tokenizer, num_blocks=blocks, eos_ids=tuple(eos_ids))
        self.decoder, self.config = decoder, config
        size, seqs, vocab = config.block_size, config.max_num_seqs, decoder.spec.vocab
        self.limits = Limits(
            max_model_len=max_model_len, vocab=vocab, cache_tokens=blocks * size, block_size=size, max_seqs=seqs
        )
        self.pool = BlockPool(blocks, config.block_size, caching=config.enable_prefix_caching)
        self.slots = Slots(decoder, config.max_loras, config.max_lora_rank) if config.enable_lora else None
        self.adapters = AdapterPool(self.slots, most_bytes=config.lora_cache_bytes, most_held=config.max_cpu_loras)
        self.runner = Runner(
            decoder,
            num_blocks=blocks,
            block_size=config.block_size,
            tokens=config.max_num_batched_tokens,
            kv_dtype=kv_dtype_of(config.kv_dtype, decoder.dtype),
            slots=self.slots,
            watch=watched(self.speculation),
        )
        self.tiers = tiers_for(decoder, config, self.pool, BlockContents(lambda: self.runner.layers))
        self.scheduler = Scheduler(
            self.pool,
            self.limits,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            policy=config.scheduling_policy,
            chunked=config.enable_chunked_prefill,
            eos_ids=tuple(eos_ids),
            adapters=self.adapters,
            speculation=self.speculation,
            tiers=self.tiers,
        )
        self.pooling = PoolingEngine(decoder, config, pooler) if pooler is not None else None
        self.grammars: Grammars | None = None
        if tokenizer is not None:
            self.grammars = Grammars(tokenizer, decoder.spec.vocab, eos_ids, self.scheduler.gated)
        self.waits = Waits(self.scheduler.clock, self.tiers)
        self.version = 0
        self._half_loaded = False
        self._steps = self._computed_tokens = 0
        self._busy_seconds = 0.0
        self._last = (0, 0.0)

    # ------------------------------------------------------------------------------------ requests
    def submit(self, request: Request) -> None:
        """Queue a request; its Outputs come from `step`, the last one with `finish` set.

        Raises:
            RequestError: malformed, out of the context, or its id is in use.
            CapacityError: it could never fit the cache; the message says what would.
        """
        if request.pooling is not None:
            if self.pooling is None:
                raise RequestError(NO_POOLING)
            self.pooling.submit(request)
            return
        if request.params.structured_outputs is not None and self.grammars is None:
            raise RequestError("this engine was made without a tokenizer, so it knows no forms", "structured_outputs")
        self.scheduler.submit(request)
        self.waits.enter(request)

    def abort(self, request_id: str) -> None:
        """End a request now and free its blocks; unknown and ended ids are ignored."""
        self.scheduler.abort(request_id)
        if self.pooling is not None:
            self.pooling.abort(request_id)

    @property
    def abilities(self) -> Abilities:
        """What may be asked of it."""
        return msgspec.structs.replace(self.pooling.abilities, generates=True) if self.pooling else Abilities()

    @property
    def has_work(self) -> bool:
        """Whether a step would do or tell something."""
        spills = self.tiers is not None and self.tiers.behind
        return self.scheduler.has_work or spills or (self.pooling is not None and self.pooling.has_work)

    def step(self) -> list[Output]:
        """Advance every request that can, by one forward pass, and tell what came of it.

        Raises:
            StateError: the engine sleeps, or its weights are half replaced.
        """
        if self._half_loaded:
            raise StateError("the last load_weights failed half-way: load a complete set of weights first")
        if self.asleep:
            raise StateError("the engine sleeps: wake it first")
        started = time.perf_counter()
        self.scheduler.expire()
        pooled = self._pool()
        if self.grammars is not None:
            self.grammars.poll()
        plan = self.scheduler.plan()
        self._spill()
        self.waits.saw(self.scheduler)
        if plan.chunks:
            self.scheduler.apply(self._execute(plan))
            self._spill()
            if self.grammars is not None:
                self.grammars.tell()  # so that it works while the outputs are handed on
            self._measure(plan, time.perf_counter() - started)
        elif self.tiers is not None and (self.tiers.loading or self.tiers.behind):
            self.tiers.wait(LOAD_SECONDS)
        elif self.grammars is not None and self.scheduler.gated:
            self.grammars.wait()
        outputs = pooled + self.scheduler.take()
        self.waits.told(outputs)
        if not self.scheduler.has_work:
            self.scheduler.check_integrity()
        return outputs

    def _spill(self) -> None:
        """Hand blocks that were published or forgotten on to the tiers, before anything is written over them."""
        if self.tiers is not None:
            self.tiers.flush()

    def _pool(self) -> list[Output]:
        """Pooling's part of the step; generation has what is left, and a token for each request at least."""
        if self.pooling is None:
            return []
        config = self.config
        taken = self.pooling.turn(config.max_num_batched_tokens, alone=not self.scheduler.has_work)
        if config.enable_chunked_prefill:  # else a prompt needs all of it
            self.scheduler.budget = max(config.max_num_batched_tokens - taken, config.max_num_seqs)
        return self.pooling.step(taken)

    def _execute(self, plan: StepPlan) -> StepResult:
        try:
            if self.grammars is None or not self.scheduler.gated:
                return self.runner.execute(plan)
            self.grammars.ask(plan)
            return self.runner.execute(plan, self.grammars.masks)
        except StreamError as error:  # the disk's affair: these requests end, and the next ones try again
            rows = tuple(ChunkResult(serial=chunk.serial, error=str(error)) for chunk in plan.chunks)
            return StepResult(step=plan.step, rows=rows)

    def _measure(self, plan: StepPlan, seconds: float) -> None:
        tokens = plan.num_tokens
        if self.speculation is not None and tokens == sum(len(chunk.draws) for chunk in plan.chunks):
            self.speculation.measured(tokens, seconds)
        self._steps += 1
        self._computed_tokens += tokens
        self._busy_seconds += seconds
        self._last = (tokens, seconds)

    # ------------------------------------------------------------------------------------ weights and memory
    def load_weights(self, named_tensors: Iterable[tuple[str, Tensor]] | None, version: int) -> None:
        """Take new weights under the checkpoint's names; running requests are computed anew with them, and go on.

        None says that the weights are in place already (a trainer that shares this decoder's storage). Versions only
        grow: the prefix cache is keyed by them, so nothing that older weights computed is ever found.

        Raises:
            ConfigError: a version that is not above the last one, or weights that are streamed from a file.
            CheckpointError: an unknown, missing or misshapen tensor; the engine then refuses to step until a
                complete set has come.
        """
        if version <= self.version:
            raise ConfigError(f"weights version {version} is not above {self.version}: count versions upwards")
        refuse_new_weights(self.decoder)
        self.scheduler.set_version(version)
        if self.tiers is not None:
            self.tiers.forget()
        if named_tensors is not None:
            self._half_loaded = True
            load_tensors(self.decoder, named_tensors)
            self._half_loaded = False
        self.runner.compile()
        self.version = version
        if self.speculation is not None and self.speculation.watcher is not None:
            self.speculation.watcher.renew(self.decoder)
        if self.pooling is not None:
            self.pooling.renew(self.decoder, version)

    def exchange(self, decoder: Decoder, version: int) -> Decoder:
        """Go on with another decoder that has the new weights already; the one it had, to be filled next.

        Nothing is moved. Otherwise as `load_weights`.

        Raises:
            ConfigError: a decoder of another model, or a version that is not above the last one.
        """
        if decoder.spec != self.decoder.spec:
            raise ConfigError("exchange: this decoder is of another model than the engine's")
        old, self.decoder, self.runner.decoder = self.decoder, decoder, decoder
        try:
            self.load_weights(None, version)
        except ConfigError:
            self.decoder = self.runner.decoder = old
            raise
        return old

    def sleep(self) -> None:
        """Give the KV cache's memory back. Requests keep their tokens, and are computed anew after `wake`."""
        self.scheduler.preempt_all()
        self.pool.forget_all()
        self._spill()  # nothing of the pool is left to be handed on
        self.runner.sleep()
        if self.pooling is not None:
            self.pooling.sleep()
        if self.speculation is not None:
            self.speculation.sleep()

    def wake(self) -> None:
        """Take the KV cache's memory again."""
        self.runner.wake()
        if self.pooling is not None:
            self.pooling.wake()

    @property
    def asleep(self) -> bool:
        return self.runner.cache is None

    def close(self) -> None:
        """Finish writing what was computed to disk; nothing may be asked of it afterwards."""
        if self.tiers is not None:
            self.tiers.close()

    # ------------------------------------------------------------------------------------ insight
    def stats(self) -> EngineStats:
        """Gauges and counters; cheap enough for every step."""
        scheduler, pool, adapters = self.scheduler, self.pool, self.adapters
        return EngineStats(
            running=len(scheduler.running),
            waiting=len(scheduler.waiting) + (self.pooling.stats().waiting if self.pooling else 0),
            blocks=pool.num_blocks,
            blocks_used=pool.used,
            blocks_cached=pool.cached,
            waste=scheduler.waste,
            step_tokens=self._last[0],
            step_seconds=self._last[1],
            steps=self._steps,
            busy_seconds=self._busy_seconds,
            computed_tokens=self._computed_tokens,
            prompt_tokens=scheduler.prompt_tokens,
            generation_tokens=scheduler.generation_tokens,
            prefix_queries=pool.queries,
            prefix_hits=pool.hits,
            external_queries=self.tiers.queries if self.tiers else 0,
            external_hits=self.tiers.hits if self.tiers else 0,
            tiers=self.tiers.counters() if self.tiers else {},
            preemptions=scheduler.preemptions,
            finished={state.value: count for state, count in scheduler.finished.items()},
            **(self.speculation.counters() if self.speculation is not None else {}),
            version=self.version,
            asleep=self.asleep,
            adapters_running=adapters.running,
            adapters_waiting=adapters.waiting,
            max_adapters=self.config.max_loras if self.slots else 0,
            adapter_bytes=adapters.nbytes,
            adapter_reads=adapters.reads,
        )


def open_engine(
    decoder: Decoder, config: EngineConfig, folder: str | Path, *, eos_ids: tuple[int, ...] = ()
) -> Engine | PoolingEngine:
    """The engine that `config` asks for (as `capacity.resolve` decided it), for the checkpoint of `decoder`.

    Raises:
        ConfigError, CapacityError: as the engine's own.
        CheckpointError: it pools in a way that Twofold does not do.
    """
    if config.runner == "pooling":
        return PoolingEngine(decoder, config, Pooler.load(decoder, folder, config.pooling))
    pooler = Pooler.load(decoder, folder, config.pooling) if config.convert == "embed" else None
    return Engine(decoder, config, eos_ids=eos_ids, tokenizer=folder, pooler=pooler)
