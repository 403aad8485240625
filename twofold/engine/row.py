"""Row: what the scheduler keeps beside a Request, its blocks, their names, and its place in the queue."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import msgspec

from ..core import StateError
from .blocks import BlockPool, Name, block_name, root_digest
from .gate import Gate
from .plan import Chunk, Draw
from .request import Request, State, TokenOut


class Row:
    """One live request in the scheduler's hands. Rows compare by rank: priority first (when it counts), then arrival.

    `published` blocks are computed and named, up to `promised` they are being computed and others may wait for them.
    `room` is how many tokens may come out; `found` how many tokens the last admission got from the prefix cache, of
    which `landed` came from a tier (tiers.py); `drafting` whether its next tokens may be guessed at; `slot` is that of
    its adapter while it runs, from 1 on; `gate` what its grammar says, if it has one. `head` is the row that stands in
    the queues for this one: itself, unless it is a beam's (beams.py).
    """

    __slots__ = (
        "_table",
        "block_size",
        "blocks",
        "chain",
        "drafting",
        "found",
        "gate",
        "head",
        "landed",
        "promised",
        "published",
        "request",
        "room",
        "root",
        "scored",
        "scores",
        "serial",
        "slot",
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
        self.landed = 0
        self.drafting = True
        self.head: Row = self
        self.gate = Gate() if request.params.structured_outputs is not None else None
        self.waits_for: bytes | None = None
        self.slot = 0
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
    def seats(self) -> int:
        """How many of the sequences that may run at once it is."""
        return 1

    @property
    def parts(self) -> tuple[Row, ...]:
        """The rows whose tokens are to be computed."""
        return (self,)

    @property
    def tables(self) -> list[list[int]]:
        """All lists of blocks it holds."""
        return [self.blocks]

    @property
    def empty(self) -> int:
        """Slots of its blocks without a token."""
        return len(self.blocks) * self.block_size - self.request.num_computed

    @property
    def guessable(self) -> int:
        """How many drafts can be of use: one less than the tokens that may still come."""
        return self.room - len(self.request.output_ids) - 1 if self.drafting else 0

    @property
    def forced(self) -> tuple[int, ...]:
        """What its grammar makes it go on with."""
        return self.gate.drafts(len(self.request.output_ids)) if self.gate is not None else ()

    @property
    def held(self) -> bool:
        """Whether nothing can be drawn before its grammar has been heard of."""
        return self.gate is not None and self.gate.held and self.remaining == 1

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

    def exchange(self, place: int, block: int) -> None:
        """Hold another block at a place."""
        self.blocks[place] = block
        self._table = tuple(self.blocks)

    def drop(self, pool: BlockPool) -> None:
        """Give all blocks back."""
        pool.release(self.blocks)
        self.blocks.clear()
        self._table = ()

    def reset(self) -> None:
        """Forget progress, but not the tokens: the row will be computed again."""
        self.published = self.promised = self.found = self.landed = 0
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
        draws = (self.draw(eos_ids),) if stop == request.num_tokens else ()
        if self.scored:
            return Chunk(
                serial=self.serial,
                start=start,
                ids=self.tokens(start, stop),
                blocks=self._table,
                adapter=self.slot,
                draws=draws,
            )
        return Chunk(
            serial=self.serial,
            start=start,
            ids=self.tokens(start, stop),
            blocks=self._table,
            targets=request.prompt_ids[start + 1 : stop + 1],
            num_top=request.params.prompt_logprobs or 0,
            adapter=self.slot,
            draws=draws,
        )

    def drafted(self, chunk: Chunk, drafts: tuple[int, ...], eos_ids: tuple[int, ...]) -> Chunk:
        """This row's chunk with guesses at what follows its last token."""
        draws = tuple(self.draw(eos_ids, drafts[:ahead]) for ahead in range(len(drafts) + 1))
        return msgspec.structs.replace(chunk, ids=chunk.ids + drafts, blocks=self._table, draws=draws)

    def draw(self, eos_ids: tuple[int, ...], drafts: tuple[int, ...] = ()) -> Draw:
        """How to choose the next token, or the one that follows some drafts if those are chosen before it."""
        request, params = self.request, self.request.params
        outputs = request.output_ids
        early = len(outputs) + len(drafts) < params.min_tokens
        repetition = params.repetition_penalty != 1.0
        history = repetition or params.presence_penalty != 0.0 or params.frequency_penalty != 0.0
        recent = self.tokens(max(0, request.num_tokens - params.longest_bad_word), request.num_tokens)
        ends = (() if params.ignore_eos else eos_ids) + params.stop_token_ids
        return Draw(
            params=params,
            seed=request.seed,
            sample=request.sample,
            position=request.num_tokens + len(drafts),
            banned=(ends if early else ()) + params.completes_bad_word((*recent, *drafts)),
            prompt_ids=request.prompt_ids if repetition else (),
            output_ids=(*outputs, *drafts) if history else (),
            beams=params.width + len(set(ends)) if params.use_beam_search else 0,
        )

    def append(
        self, drawn: tuple[TokenOut, ...], eos_ids: tuple[int, ...], now: float
    ) -> tuple[tuple[TokenOut, ...], tuple[State, int | None] | None]:
        """Take the tokens of a step as outputs, up to the one that ends the request; those, and how it ends."""
        for count, token in enumerate(drawn, 1):
            self.request.output_ids.append(token.id)
            end = self.end(eos_ids, now)
            if end is not None:
                return drawn[:count], end
        return drawn, None

    def prompt_scores(self, more: tuple[TokenOut, ...]) -> tuple[TokenOut, ...] | None:
        """With some more, the prompt's scores, once, when they are complete; nothing comes before the first token."""
        self.scores.extend(more)
        prompt = self.request.prompt_ids
        if self.scored or len(self.scores) < len(prompt) - 1:
            return None
        self.scored = True
        return (TokenOut(prompt[0]), *self.scores)

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


def check_queues(running: Sequence[Row], waiting: Sequence[Row], count: int) -> None:
    """Check that the two queues hold all `count` rows, in order, and that only running ones hold blocks.

    Raises:
        StateError: saying what does not add up; always a bug in Twofold.
    """
    if len(running) + len(waiting) != count:
        raise StateError(f"{count} requests, but {len(running)} running, {len(waiting)} waiting")
    for queue in (running, waiting):
        if any(b < a for a, b in pairwise(queue)):
            raise StateError("a queue is out of order")
    if any(table for row in waiting for table in row.tables):
        raise StateError("a waiting request holds blocks")
