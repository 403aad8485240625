"""Speculation: a proposer, the pace it is asked at, and what came of it; the scheduler's and the engine's one door.

guess ─▶ proposer, pace ─▶ drafts      told ─▶ right or wrong, grade by grade      measured ─▶ what a step costs
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from .config import SpeculativeConfig
from .lookup import NGram, Suffix
from .pace import Pace
from .proposer import GRADES, Guess, Proposer, Watcher
from .request import TokenOut
from .row import Row

if TYPE_CHECKING:
    from torch import Tensor

    from .plan import StepPlan, StepResult


class Speculation:
    """At most `most` drafts of a request in one step. Counters are vLLM's spec_decode metrics."""

    def __init__(
        self,
        proposer: Proposer,
        *,
        most: int,
        adaptive: bool = True,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.proposer = proposer
        self.most = most
        self.pace = Pace(adaptive=adaptive)
        self.drafts = 0
        self.draft_tokens = 0
        self.accepted = [0] * most  # by position in the draft
        self._clock = clock
        self._guesses: dict[int, Guess] = {}
        self._seconds = 0.0

    def guess(self, rows: Sequence[Row], base: int, room: int) -> dict[int, tuple[int, ...]]:
        """Drafts by the serial of their row, in a step of `base` tokens that has room for `room` more."""
        began = self._clock()
        self._guesses = {}
        wanted = [(row, count) for row in rows if (count := min(self.most, row.guessable)) > 0]
        if self.proposer.costs:
            graded = [(row.serial, tuple(min(at, GRADES - 1) for at in range(count))) for row, count in wanted]
            counts = self.pace.lengths(graded, base, room, drawing=len(rows))
            asked = [(row, count) for (row, _), count in zip(wanted, counts) if count]
            self._guesses = self.proposer.propose(asked) if asked else {}
            sent = {serial: guess.tokens for serial, guess in self._guesses.items()}
        else:
            self._guesses = self.proposer.propose(wanted)
            graded = [(serial, guess.grades) for serial, guess in self._guesses.items()]
            counts = self.pace.lengths(graded, base, room, drawing=len(rows)) if graded else []
            sent = {serial: self._guesses[serial].tokens[:count] for (serial, _), count in zip(graded, counts)}
        self._seconds = self._clock() - began
        deepest = max((len(tokens) for tokens in sent.values()), default=0)
        if self.proposer.costs and deepest:
            self.pace.per_pass += 0.2 * (self._seconds / deepest - self.pace.per_pass)
        return sent

    def told(self, row: Row, drawn: Sequence[TokenOut], drafted: int) -> None:
        """What the model chose where `drafted` of the row's guessed tokens had been sent.

        Tokens that were guessed and not sent are compared too: that a guess would have been right is known for free.
        """
        guess = self._guesses.get(row.serial)
        if guess is not None:
            rates = self.pace.rates(row.serial)
            for token, drawn_token, grade in zip(guess.tokens, drawn, guess.grades):
                rates.saw(grade, token == drawn_token.id)
                if token != drawn_token.id:
                    break
        if drafted:
            kept = len(drawn) - 1
            self.drafts += 1
            self.draft_tokens += drafted
            row.request.drafted += drafted
            row.request.accepted += kept
            for place in range(kept):
                self.accepted[place] += 1
            self.proposer.told(row, kept)

    def measured(self, tokens: int, seconds: float) -> None:
        """A step whose tokens were each followed by a draw has taken so long, guessing included."""
        self.pace.cost.saw(tokens, seconds - self._seconds if self.proposer.costs else seconds)

    def forget(self, row: Row) -> None:
        self._guesses.pop(row.serial, None)
        self.pace.forget(row.serial)
        self.proposer.forget(row)

    @property
    def watcher(self) -> Watcher | None:
        """The proposer, if it is to see what the model computes."""
        return self.proposer if isinstance(self.proposer, Watcher) else None

    def counters(self) -> dict[str, Any]:
        """What `EngineStats` says of guesses."""
        return {
            "drafts": self.drafts,
            "draft_tokens": self.draft_tokens,
            "accepted_tokens": sum(self.accepted),
            "accepted_per_pos": tuple(self.accepted),
        }

    def sleep(self) -> None:
        self.proposer.sleep()


def watched(speculation: Speculation | None) -> Callable[[StepPlan, StepResult, Tensor], None] | None:
    """Who is to see each step's hidden states, if anybody."""
    watcher = speculation.watcher if speculation is not None else None
    return watcher.saw if watcher is not None else None


def lookup(config: SpeculativeConfig) -> Proposer:
    """The proposer of a method that needs no model."""
    if config.method == "ngram":
        return NGram(config.prompt_lookup_min, config.prompt_lookup_max)
    return Suffix(
        config.suffix_decoding_max_tree_depth,
        config.suffix_decoding_max_cached_requests,
        config.suffix_decoding_min_token_prob,
    )
