"""What passes between the scheduler and the runner: plain frozen values that can cross a process (msgspec).

    Scheduler.plan() ──▶ StepPlan(chunks) ──▶ Runner.execute() ──▶ StepResult(rows) ──▶ Scheduler.apply()

A plan holds all that its execution needs, so a runner keeps nothing but weights and the KV cache.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import msgspec

from .request import TokenOut
from .sampling import SamplingParams

Masks = Callable[[], Mapping[int, Sequence[bytes]]]
"""Asked between a step's forward pass and its draws: by serial, a mask for each draw that a row with a grammar may make
now, in order; none for a row that must wait. A row that is not named draws freely."""


class Draw(msgspec.Struct, frozen=True, kw_only=True):
    """How to choose the token at `position` (its index in prompt and output together).

    `banned` are the ids that may not come yet (`min_tokens`). The histories are filled in only for penalties, and hold
    the drafts before this draw. `beams` asks for that many alternatives, as a beam search ranks them.
    """

    params: SamplingParams
    seed: int
    sample: int
    position: int
    banned: tuple[int, ...] = ()
    prompt_ids: tuple[int, ...] = ()
    output_ids: tuple[int, ...] = ()
    beams: int = 0


class Chunk(msgspec.Struct, frozen=True, kw_only=True):
    """The tokens `start .. start + len(ids) - 1` of one request, whose blocks are already allocated.

    `targets` are the tokens that follow each of the first `len(targets)` ones, when the prompt is to be scored, with
    `num_top` alternatives each. `adapter` is the slot of the request's adapter,
    from 1 on, and 0 without one. `draws` are set on the chunk that reaches the last known token:

        ids      t t t t d d d      the last `len(draws) - 1` are drafts, guesses at what the draws before them give
        draws          0 1 2 3      each chooses what follows the token it stands under
    """

    serial: int
    start: int
    ids: tuple[int, ...]
    blocks: tuple[int, ...]
    targets: tuple[int, ...] = ()
    num_top: int = 0
    adapter: int = 0
    draws: tuple[Draw, ...] = ()

    @property
    def drafts(self) -> tuple[int, ...]:
        """The guesses at the end of `ids`."""
        return self.ids[len(self.ids) - len(self.draws) + 1 :] if self.draws else ()


class StepPlan(msgspec.Struct, frozen=True, kw_only=True):
    """One forward pass: decodes first, then pieces of prompts, at most a token budget together.

    `copies` are blocks (from, to) whose content is copied before it: two beams are about to write different tokens.
    """

    step: int
    chunks: tuple[Chunk, ...] = ()
    copies: tuple[tuple[int, int], ...] = ()

    @property
    def num_tokens(self) -> int:
        return sum(len(chunk.ids) for chunk in self.chunks)


class ChunkResult(msgspec.Struct, frozen=True, kw_only=True):
    """What became of one chunk: the tokens drawn, scores of the targets, or the reason it failed.

    `tokens` are the model's own choices, up to and including the first that differs from its draft. None of them
    although some were to be drawn means: not in this step, compute the last known token again. `redo` says that the
    drafts ruined what the cache held from that position on: compute it anew, and draft no more. A beam's one token
    holds the alternatives in `top`, with edited log-probabilities, and `thoughts` the model's own of each if asked.
    `param` is the field of the request that is to blame for `error`.
    """

    serial: int
    tokens: tuple[TokenOut, ...] = ()
    scores: tuple[TokenOut, ...] = ()
    thoughts: tuple[TokenOut, ...] = ()
    error: str | None = None
    redo: int | None = None
    param: str | None = None


class StepResult(msgspec.Struct, frozen=True, kw_only=True):
    """One ChunkResult for each chunk of the plan of the same `step`."""

    step: int
    rows: tuple[ChunkResult, ...] = ()
