"""Row: what the scheduler keeps beside a Request, its blocks, their names, and its place in the queue."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from .blocks import Name, block_name, root_digest
from .plan import Chunk, Draw
from .request import Request, State, TokenOut


class Row:
    """One live request in the scheduler's hands. Rows compare by rank: priority first (when it counts), then arrival.

    `published` blocks are computed and named, up to `promised` they are being computed and others may wait for them.
    `room` is how many tokens may come out; `found` how many tokens the last admission got from the prefix cache;
    `drafting` whether its next tokens may be guessed at.
    """

    __slots__ = (
        "_table",
        "block_size",
        "blocks",
        "chain",
        "drafting",
        "found",
        "promised",
        "published",
        "request",
        "room",
        "root",
        "scored",
        "scores",
        "serial",
        "urgency",
        "waits_for",
    )

    def __init__(self, request: Request, *, serial: int, urgency: int, room: int, block_size: int) -> None:
        self.request = request
        self.serial = serial
        self.urgency = urgency
        self.room = room
        self.block_size = block_size
        self.blocks: list[int] = []
        self.root = b""
        self.chain: list[Name] = []
        self.published = 0
        self.promised = 0
        self.found = 0
        self.drafting = True
        self.waits_for: bytes | None = None
        self.scores: list[TokenOut] = []
        self.scored = request.params.prompt_logprobs is None
        self._table: tuple[int, ...] = ()

    def __lt__(self, other: Row) -> bool:
        return (self.urgency, self.serial) < (other.urgency, other.serial)

    @property
    def remaining(self) -> int:
        """Known tokens that are not computed yet: 1 in decode, at least 1 always."""
        return self.request.num_tokens - self.request.num_computed

    @property
    def loss(self) -> int:
        """Tokens that would have to be computed again if the row were preempted now."""
        return self.request.num_computed - self.found

    @property
    def guessable(self) -> int:
        """How many drafts can be of use: one less than the tokens that may still come."""
        return self.room - len(self.request.output_ids) - 1 if self.drafting else 0

    @property
    def readable(self) -> int:
        """How many leading blocks may come from the prefix cache; the last token is always computed, for its logits."""
        return (self.request.num_tokens - 1) // self.block_size if self.scored else 0

    def tokens(self, start: int, stop: int) -> tuple[int, ...]:
        """Known tokens `start` to `stop - 1`, without joining prompt and outputs."""
        prompt, output = self.request.prompt_ids, self.request.output_ids
        size = len(prompt)
        if start >= size:
            return tuple(output[start - size : stop - size])
        return prompt[start:stop] + tuple(output[: max(0, stop - size)])

    # ------------------------------------------------------------------------------------ names
    def rename(self, version: int) -> None:
        """Start the chain of names anew for these weights."""
        self.root = root_digest(self.request.salt, version, self.request.adapter)
        self.chain.clear()
        self.name_blocks(self.request.num_tokens)

    def name_blocks(self, upto: int) -> None:
        """Extend the chain over every full block among the first `upto` known tokens."""
        size = self.block_size
        for start in range(len(self.chain) * size, upto - size + 1, size):
            parent = self.chain[-1][0] if self.chain else self.root
            self.chain.append(block_name(parent, self.tokens(start, start + size)))

    # ------------------------------------------------------------------------------------ blocks
    def grow(self, blocks: Sequence[int]) -> None:
        self.blocks.extend(blocks)
        self._table = tuple(self.blocks)

    def reset(self) -> None:
        """Forget blocks and progress, but not the tokens: the row will be computed again."""
        self.blocks.clear()
        self._table = ()
        self.published = self.promised = self.found = 0
        self.waits_for = None
        self.request.num_computed = 0
        if not self.scored:
            self.scores.clear()

    # ------------------------------------------------------------------------------------ a step
    def chunk(self, count: int, eos_ids: tuple[int, ...]) -> Chunk:
        """The next `count` tokens as a piece of a plan."""
        request = self.request
        start = request.num_computed
        stop = start + count
        draws = self._draws(eos_ids) if stop == request.num_tokens else ()
        if self.scored:
            return Chunk(serial=self.serial, start=start, ids=self.tokens(start, stop), blocks=self._table, draws=draws)
        return Chunk(
            serial=self.serial,
            start=start,
            ids=self.tokens(start, stop),
            blocks=self._table,
            targets=request.prompt_ids[start + 1 : stop + 1],
            num_top=request.params.prompt_logprobs or 0,
            draws=draws,
        )

    def drafted(self, chunk: Chunk, drafts: tuple[int, ...], eos_ids: tuple[int, ...]) -> Chunk:
        """This row's chunk with guesses at what follows its last token."""
        draws = self._draws(eos_ids, drafts)
        return msgspec.structs.replace(chunk, ids=chunk.ids + drafts, blocks=self._table, draws=draws)

    def _draws(self, eos_ids: tuple[int, ...], drafts: tuple[int, ...] = ()) -> tuple[Draw, ...]:
        """How to choose the next token, and what follows each draft if it is the one chosen."""
        request, params = self.request, self.request.params
        repetition = params.repetition_penalty != 1.0
        history = repetition or params.presence_penalty != 0.0 or params.frequency_penalty != 0.0
        said, known = len(request.output_ids), request.num_tokens
        outputs = (*request.output_ids, *drafts) if history else ()
        ends = (() if params.ignore_eos else eos_ids) + params.stop_token_ids
        return tuple(
            Draw(
                params=params,
                seed=request.seed,
                sample=request.sample,
                position=known + ahead,
                banned=ends if said + ahead < params.min_tokens else (),
                prompt_ids=request.prompt_ids if repetition else (),
                output_ids=outputs[: said + ahead],
            )
            for ahead in range(len(drafts) + 1)
        )

    def end(self, eos_ids: tuple[int, ...], now: float) -> tuple[State, int | None] | None:
        """Whether the last output ends the request, in the order EOS, stop ids, length, deadline; and the stop id."""
        request, params = self.request, self.request.params
        outputs = request.output_ids
        if len(outputs) >= params.min_tokens:
            if outputs[-1] in eos_ids and not params.ignore_eos:
                return State.STOP, None
            if outputs[-1] in params.stop_token_ids:
                return State.STOP, outputs[-1]
        if len(outputs) >= self.room:
            return State.LENGTH, None
        if request.deadline is not None and now >= request.deadline:
            return State.TIMEOUT, None
        return None
