"""DraftModel: a second, smaller checkpoint of the same vocabulary writes ahead, one token a pass for all rows together.

It samples with the very numbers (seed, sample, position) and settings that the model itself will use, so where their
distributions are close they choose the same token, at any temperature. Its keys and values lie in a small cache of its
own; a row that it has not followed for a while is read up first, within its budget of tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from ..core import ConfigError
from ..models.decoder import Decoder
from ..models.weights import load
from .blocks import BlockPool
from .capacity import DTYPES, kv_dtype_of, resolve
from .config import EngineConfig
from .paged import KVCache
from .plan import Chunk, ChunkResult, StepPlan
from .proposer import GRADES, Guess
from .row import Row
from .runner import Runner


def draft_model(target: Decoder, config: EngineConfig, *, num_blocks: int, eos_ids: tuple[int, ...]) -> DraftModel:
    """Load the draft model that the settings name, for a target with a cache of `num_blocks` blocks.

    Its own cache has as many at most, and takes no more than a quarter of the target's bytes.

    Raises:
        CheckpointError: it cannot be read.
        ConfigError: a draft of another vocabulary.
    """
    speculative = config.speculative
    assert speculative.model is not None, "the settings were checked"
    wanted = EngineConfig(
        dtype=speculative.dtype, quantization=speculative.quantization, kv_dtype=config.kv_dtype, device=config.device
    )
    wanted = resolve(wanted, speculative.model)
    decoder = load(
        speculative.model, dtype=DTYPES[wanted.dtype], device=config.device, quantization=wanted.quantization
    )
    kv_dtype = kv_dtype_of(wanted.kv_dtype, decoder.dtype)
    theirs = KVCache.bytes_per_block(target.spec, config.block_size, kv_dtype_of(config.kv_dtype, target.dtype))
    ours = KVCache.bytes_per_block(decoder.spec, config.block_size, kv_dtype)
    return DraftModel(
        decoder,
        vocab=target.spec.vocab,
        num_blocks=max(1, min(num_blocks, num_blocks * theirs // (4 * ours))),
        block_size=config.block_size,
        tokens=config.max_num_batched_tokens,
        eos_ids=eos_ids,
        kv_dtype=kv_dtype,
    )


@dataclass(slots=True)
class _Held:
    """A row as the draft model has it: its blocks, how many tokens in them are the row's own, and the last guess."""

    blocks: list[int] = field(default_factory=list)
    sure: int = 0
    known: int = 0
    written: int = 0


class DraftModel:
    """`decoder` guesses at what a model of `vocab` tokens says; `num_blocks` blocks of keys and values are its own.

    Raises:
        ConfigError: a draft of another vocabulary.
    """

    costs = True

    def __init__(
        self,
        decoder: Decoder,
        *,
        vocab: int,
        num_blocks: int,
        block_size: int,
        tokens: int,
        eos_ids: tuple[int, ...],
        kv_dtype: torch.dtype | None = None,
    ) -> None:
        if decoder.spec.vocab != vocab:
            raise ConfigError(
                f"the draft model has {decoder.spec.vocab} tokens and the model {vocab}: "
                "choose a draft with the same tokenizer"
            )
        self.pool = BlockPool(num_blocks, block_size, caching=False)
        self.runner = Runner(decoder, num_blocks=num_blocks, block_size=block_size, tokens=tokens, kv_dtype=kv_dtype)
        self.eos_ids = eos_ids
        self._held: dict[int, _Held] = {}

    def propose(self, wanted: Sequence[tuple[Row, int]]) -> dict[int, Guess]:
        if self.runner.cache is None:
            self.runner.wake()
        serving = {row.serial for row, _ in wanted}
        drafts: dict[int, tuple[int, ...]] = {}
        live = self._read_up([(row, count) for row, count in wanted if self._hold(row, count, serving)], drafts)
        depth = 1
        while live := [
            (row, count) for row, count in live if count > depth and len(drafts.get(row.serial, ())) == depth
        ]:
            chunks = [self._next(row, drafts[row.serial]) for row, _ in live]
            self._run(chunks, drafts)
            depth += 1
        for serial, tokens in drafts.items():
            held = self._held[serial]
            held.written = held.known + len(tokens) - 1
        grades = tuple(min(at, GRADES - 1) for at in range(depth))
        return {serial: Guess(tokens, grades[: len(tokens)]) for serial, tokens in drafts.items()}

    def _hold(self, row: Row, count: int, serving: set[int]) -> bool:
        """Make sure of blocks for a row and its guess; those of rows not served now are taken back if need be."""
        known = row.request.num_tokens
        if known + count > self.runner.decoder.max_len:
            return False
        held = self._held.setdefault(row.serial, _Held())
        need = self.pool.blocks_for(known + count - 1) - len(held.blocks)
        for serial in [serial for serial in self._held if serial not in serving]:
            if need <= self.pool.available:
                break
            self._drop(serial)
        if need > self.pool.available:
            return False
        held.blocks += self.pool.allocate(max(0, need))
        held.known = known
        held.sure = min(held.sure, known - 1)  # the last token is always computed, for what follows it
        return True

    def _read_up(self, wanted: Sequence[tuple[Row, int]], drafts: dict[int, tuple[int, ...]]) -> list[tuple[Row, int]]:
        """Compute what is missing of each row, as far as the budget goes, and guess the first token where all is."""
        left, chunks, live = self.runner.tokens, [], []
        for row, count in wanted:
            held = self._held[row.serial]
            stop = min(held.known, held.sure + left)
            if stop == held.sure:
                continue
            whole = stop == held.known
            chunks.append(
                Chunk(
                    serial=row.serial,
                    start=held.sure,
                    ids=row.tokens(held.sure, stop),
                    blocks=tuple(held.blocks),
                    draws=(row.draw(self.eos_ids),) if whole else (),
                )
            )
            left -= stop - held.sure
            held.sure = held.written = stop
            if whole:
                live.append((row, count))
        self._run(chunks, drafts)
        return live

    def _next(self, row: Row, drafts: tuple[int, ...]) -> Chunk:
        held = self._held[row.serial]
        return Chunk(
            serial=row.serial,
            start=held.known + len(drafts) - 1,
            ids=drafts[-1:],
            blocks=tuple(held.blocks),
            draws=(row.draw(self.eos_ids, drafts),),
        )

    def _run(self, chunks: Sequence[Chunk], drafts: dict[int, tuple[int, ...]]) -> None:
        """One pass; every draw adds a token to its row's guess, and a row that fails is left alone."""
        if not chunks:
            return
        results: tuple[ChunkResult, ...] = self.runner.execute(StepPlan(step=0, chunks=tuple(chunks))).rows
        for got in results:
            if got.error is not None:
                self._drop(got.serial)
                drafts.pop(got.serial, None)
            elif got.tokens:
                drafts[got.serial] = (*drafts.get(got.serial, ()), got.tokens[0].id)

    def told(self, row: Row, kept: int) -> None:
        held = self._held.get(row.serial)
        if held is not None:
            held.sure = min(held.written, held.known + kept)

    def forget(self, row: Row) -> None:
        self._drop(row.serial)

    def sleep(self) -> None:
        for serial in tuple(self._held):
            self._drop(serial)
        self.runner.sleep()

    def _drop(self, serial: int) -> None:
        held = self._held.pop(serial, None)
        if held is not None:
            self.pool.release(held.blocks)
