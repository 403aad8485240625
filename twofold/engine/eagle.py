"""Eagle: a draft head goes on with the model's own hidden states, one token a pass for all rows together.

    model         h0  h1  h2                    what the runner's steps leave, of tokens that were kept
    head      t0  t1  t2  t3 ─▶ f3 ─▶ t4'       each token beside the hidden state before it
                                t4' ─▶ f4 ─▶ t5'       from here on beside what the head said itself

After EAGLE (Li et al. 2024). It draws with the model's language head, numbers and settings, as `draft.py` does. Keys
and values of its layer lie in blocks of its own. Hidden states of tokens that came from the prefix cache were not here:
its text then begins behind them, as the texts begin that it was trained on, with zeros before it.

Shapes: T tokens, R rows, D hidden size.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from ..core import ConfigError
from ..models.decoder import Decoder
from ..models.draft_head import check, digest, made_for
from ..models.weights import load, read_config, read_spec
from .blocks import BlockPool
from .capacity import DTYPES, kv_dtype_of, rows_at_once
from .config import EngineConfig
from .paged import KVCache, PagedContext, Span
from .plan import Chunk, ChunkResult, Draw, StepPlan, StepResult
from .proposer import GRADES, Guess
from .row import Row
from .sampler import sample

PENDING = 64
"""Hidden states of a row that wait for a guess; more are read at once, so that long prompts are not kept."""

log = logging.getLogger("twofold.engine")


def eagle(
    target: Decoder, config: EngineConfig, folder: str | Path | None, *, num_blocks: int, eos_ids: tuple[int, ...]
) -> Eagle:
    """Load the draft head that the settings name, for a target that was read from `folder` and has `num_blocks` blocks.

    Its own cache has as many at most, and takes no more than a quarter of the target's bytes.

    Raises:
        CheckpointError: it cannot be read.
        ConfigError: it is no draft head, or one for models of another shape.
    """
    speculative = config.speculative
    assert speculative.model is not None, "the settings were checked"
    check(read_spec(speculative.model), target.spec)
    dtype = target.compute if speculative.dtype == "auto" else DTYPES[speculative.dtype]
    head = load(speculative.model, dtype=dtype, device=target.device)
    name = made_for(read_config(speculative.model))
    if folder is not None and name and name != digest(Path(folder)):
        log.warning("the draft head %s was trained beside another model than %s", speculative.model, folder)
    size = config.block_size
    theirs = KVCache.bytes_per_block(target.spec, size, kv_dtype_of(config.kv_dtype, target.dtype))
    ours = KVCache.bytes_per_block(head.spec, size, head.compute)
    return Eagle(
        head,
        target,
        num_blocks=max(1, min(num_blocks, num_blocks * theirs // (4 * ours))),
        block_size=size,
        tokens=config.max_num_batched_tokens,
        eos_ids=eos_ids,
    )


@dataclass(slots=True)
class _Held:
    """A row as the head has it. Positions are the row's; `first` is where its text begins for the head.

    Hidden states of tokens before `seen` were here, `last_D` is the last. Of tokens before `done` there are keys and
    values; the `ids` from there to `seen` wait, with the hidden states before each.
    """

    first: int
    seen: int
    done: int
    last_D: Tensor
    ids: list[int] = field(default_factory=list)
    before: list[Tensor] = field(default_factory=list)
    blocks: list[int] = field(default_factory=list)


class Eagle:
    """`head` guesses at what `target` says; `num_blocks` blocks of keys and values are its own.

    Raises:
        ConfigError: a head that was made for shorter texts.
    """

    costs = True

    def __init__(
        self,
        head: Decoder,
        target: Decoder,
        *,
        num_blocks: int,
        block_size: int,
        tokens: int,
        eos_ids: tuple[int, ...] = (),
    ) -> None:
        check(head.spec, target.spec)
        if head.max_len < target.max_len:
            raise ConfigError(f"the draft head was made for {head.max_len} tokens, the model for {target.max_len}")
        self.head, self.target, self.eos_ids = head, target, eos_ids
        self.pool = BlockPool(num_blocks, block_size, caching=False)
        self.cache: KVCache | None = None
        self._rows = rows_at_once(tokens, target.spec.vocab)
        self._most = tokens  # rows that are kept; the parts of a beam search are never said to have ended
        self._held: dict[int, _Held] = {}

    # ------------------------------------------------------------------------------------ what the model says
    @torch.inference_mode()
    def saw(self, plan: StepPlan, result: StepResult, hidden_TD: Tensor) -> None:
        """A step has been run: keep the hidden states of tokens that are certain."""
        at, long = 0, list[int]()
        for chunk, got in zip(plan.chunks, result.rows, strict=True):
            if got.error is None and got.redo is None and not any(draw.beams for draw in chunk.draws):
                held = self._keep(chunk, got, hidden_TD[at : at + len(chunk.ids)])
                if len(held.ids) > PENDING:
                    long.append(chunk.serial)
            at += len(chunk.ids)
        long = [serial for serial in long if serial in self._held]
        roomy = [serial for serial in long if self._room(serial, self._held[serial].seen, long)]
        for serial in set(long) - set(roomy):
            self._drop(serial)
        if roomy:
            self._read(roomy)

    def _keep(self, chunk: Chunk, got: ChunkResult, hidden_TD: Tensor) -> _Held:
        held = self._held.get(chunk.serial)
        if held is None or held.seen < chunk.start:
            self._drop(chunk.serial)
            if len(self._held) >= self._most:
                self._drop(next(iter(self._held)))
            nothing_D = hidden_TD.new_zeros(hidden_TD.shape[1])
            held = self._held[chunk.serial] = _Held(chunk.start, chunk.start, chunk.start, nothing_D)
        sure = len(chunk.ids) - len(chunk.draws) + len(got.tokens)
        known = held.seen - chunk.start
        if known < sure:
            fresh_TD = hidden_TD[known:sure].clone()  # the step's memory is the next one's
            before_TD = held.last_D[None] if len(fresh_TD) == 1 else torch.cat((held.last_D[None], fresh_TD[:-1]))
            skip = max(0, held.done - held.seen)
            held.ids += chunk.ids[known + skip : sure]
            held.before.append(before_TD[skip:])
            held.seen, held.last_D = chunk.start + sure, fresh_TD[-1]
        return held

    def renew(self, target: Decoder) -> None:
        """The model has new weights, and may be another object: nothing that was seen holds."""
        self.target = target
        for serial in tuple(self._held):
            self._drop(serial)

    # ------------------------------------------------------------------------------------ guesses
    @torch.inference_mode()
    def propose(self, wanted: Sequence[tuple[Row, int]]) -> dict[int, Guess]:
        asked = [row.serial for row, _ in wanted]
        live: list[tuple[Row, int]] = []
        for row, count in wanted:
            held, known = self._held.get(row.serial), row.request.num_tokens
            if held is None or held.seen != known - 1 or known + count > self.head.max_len:
                continue
            if self._room(row.serial, known + count - 1, asked):
                held.done = min(held.done, held.seen)  # asked again about the same token
                held.ids += row.tokens(held.seen, known)
                held.before.append(held.last_D[None])
                live.append((row, count))
        found: dict[int, tuple[int, ...]] = {row.serial: () for row, _ in live}
        said = self._read(list(found)) if live else {}
        depth = 0
        while live := [(row, count) for row, count in live if row.serial in said and count > depth]:
            if depth:
                said = self._go_on([(row.serial, found[row.serial][-1]) for row, _ in live], said, depth)
                live = [(row, count) for row, count in live if row.serial in said]
            said = self._draw([row for row, _ in live], said, found)
            depth += 1
        grades = tuple(min(at, GRADES - 1) for at in range(depth))
        return {serial: Guess(tokens, grades[: len(tokens)]) for serial, tokens in found.items() if tokens}

    def _draw(self, rows: list[Row], said: dict[int, Tensor], found: dict[int, tuple[int, ...]]) -> dict[int, Tensor]:
        """One more token of each row, and what was said where there is one."""
        out: dict[int, Tensor] = {}
        for start in range(0, len(rows), self._rows):
            tile = rows[start : start + self._rows]
            draws: list[Draw] = [row.draw(self.eos_ids, found[row.serial]) for row in tile]
            hidden_RD = torch.stack([said[row.serial] for row in tile])
            for row, token in zip(tile, sample(self.target.logits(hidden_RD), draws), strict=True):
                if not isinstance(token, str):
                    found[row.serial] += (token.id,)
                    out[row.serial] = said[row.serial]
        return out

    def _read(self, serials: list[int]) -> dict[int, Tensor]:
        """Read all that waits of some rows, and say what follows the last token of each: [D]."""
        rows = [self._held[serial] for serial in serials]
        spans = [(held.done, held.ids, torch.cat(held.before)) for held in rows]
        for held in rows:
            held.done += len(held.ids)
            held.ids, held.before = [], []
        return self._pass(serials, spans)

    def _go_on(self, drafted: list[tuple[int, int]], said: dict[int, Tensor], depth: int) -> dict[int, Tensor]:
        """Read the last guessed token of each row, beside what the head said before it."""
        spans = [(self._held[serial].done + depth - 1, [token], said[serial][None]) for serial, token in drafted]
        return self._pass([serial for serial, _ in drafted], spans)

    def _pass(self, serials: list[int], spans: list[tuple[int, list[int], Tensor]]) -> dict[int, Tensor]:
        """One pass over (position, ids, hidden state before each) of every row; what is said of each one's last token.

        A row with numbers that are not finite is let go, and what it wrote is zeroed for whoever is next.
        """
        if self.cache is None:
            head = self.head
            self.cache = KVCache(head.spec, self.pool.num_blocks, self.pool.block_size, head.compute, head.device)
        rows, ids_T = [self._held[serial] for serial in serials], [token for _, ids, _ in spans for token in ids]
        places = [Span(start - held.first, len(ids), tuple(held.blocks)) for held, (start, ids, _) in zip(rows, spans)]
        positions = [position for start, ids, _ in spans for position in range(start, start + len(ids))]
        device = self.target.device
        tokens_TD = self.target.embedded(torch.tensor(ids_T, device=device), torch.tensor(positions, device=device))
        joined_TD = torch.cat((torch.cat([before for _, _, before in spans]), tokens_TD), -1)
        said_TD = self.head.through(self.head.join(joined_TD), PagedContext(self.cache, places))
        good_T = torch.isfinite(said_TD).all(-1).tolist()
        out, at = dict[int, Tensor](), 0
        for serial, held, (_, ids, _) in zip(serials, rows, spans):
            at += len(ids)
            if all(good_T[at - len(ids) : at]):
                out[serial] = said_TD[at - 1]
            else:
                self.cache.clear(held.blocks)
                self._drop(serial)
        return out

    # ------------------------------------------------------------------------------------ what is held
    def _room(self, serial: int, stop: int, serving: Sequence[int]) -> bool:
        """Make sure of blocks for a row up to `stop`; those of rows not served now are taken back if need be."""
        held, kept = self._held[serial], {serial, *serving}
        need = self.pool.blocks_for(stop - held.first) - len(held.blocks)
        for other in [other for other in self._held if other not in kept]:
            if need <= self.pool.available:
                break
            self._drop(other)
        if need > self.pool.available:
            return False
        held.blocks += self.pool.allocate(max(0, need))
        return True

    def told(self, row: Row, kept: int) -> None:
        """`saw` was here before."""

    def forget(self, row: Row) -> None:
        self._drop(row.serial)

    def sleep(self) -> None:
        for serial in tuple(self._held):
            self._drop(serial)
        self.cache = None

    def _drop(self, serial: int) -> None:
        held = self._held.pop(serial, None)
        if held is not None:
            self.pool.release(held.blocks)
