"""Request: one sequence to be continued, with a checked state machine; and Output, what a step says about it.

        submit             plan                   apply
  (new) ──────▶ WAITING ────────▶ RUNNING ─────────────────▶ STOP | LENGTH
                  │                │   ▲                       ▲
                  │       out of   ▼   │ plan                  │ resumed at its last token
                  │       blocks PREEMPTED ────────────────────┘
                  └────────────┴──── any of the three ──────▶ ABORT | TIMEOUT | ERROR

`n` samples of one prompt are n Requests that differ in `sample`; the block pool lets them share the prompt's blocks.
"""

from __future__ import annotations

import secrets
import time
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import msgspec
from msgspec.structs import replace

from ..core import StateError
from .facts import Facts
from .sampling import SamplingParams
from .vectors import Pooled, Pooling


class State(StrEnum):
    WAITING = "waiting"
    RUNNING = "running"
    PREEMPTED = "preempted"
    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    TIMEOUT = "timeout"
    ERROR = "error"

    @property
    def finished(self) -> bool:
        return self not in _LIVE


_LIVE = {State.WAITING, State.RUNNING, State.PREEMPTED}
_ENDS = {State.ABORT, State.TIMEOUT, State.ERROR}
_LEGAL: dict[State, set[State]] = {
    State.WAITING: {State.RUNNING, State.STOP, State.LENGTH} | _ENDS,
    State.RUNNING: {State.PREEMPTED, State.STOP, State.LENGTH} | _ENDS,
    State.PREEMPTED: {State.RUNNING} | _ENDS,
}


@dataclass(kw_only=True, slots=True)
class Request:
    """One sequence: `prompt_ids` then `output_ids`. A resumed request arrives with outputs already in place.

    `num_computed` counts the tokens whose keys and values are in the cache; the engine chases `num_tokens` with it.
    `deadline` is a `time.monotonic()` instant. `salt` keeps tenants' cached prefixes apart. With `pooling` the prompt
    is not continued but read, its tokens of `types` (0 where there are none).
    """

    id: str
    prompt_ids: tuple[int, ...]
    params: SamplingParams
    sample: int = 0
    priority: int = 0
    deadline: float | None = None
    salt: str = ""
    adapter: str = ""
    arrival: float = field(default_factory=time.monotonic)
    output_ids: list[int] = field(default_factory=list)
    seed: int = -1
    pooling: Pooling | None = None
    types: tuple[int, ...] = ()
    state: State = field(default=State.WAITING, init=False)
    num_computed: int = field(default=0, init=False)
    num_cached: int = field(default=0, init=False)
    preemptions: int = field(default=0, init=False)
    drafted: int = field(default=0, init=False)
    accepted: int = field(default=0, init=False)
    waits: dict[str, float] = field(default_factory=dict, init=False)
    tiers: dict[str, int] = field(default_factory=dict, init=False)
    told: Facts = field(default=Facts(), init=False)

    def __post_init__(self) -> None:
        if self.seed < 0:
            given = self.params.seed
            self.seed = secrets.randbits(63) if given is None else given % 2**64

    def move(self, to: State) -> None:
        """Change state; an illegal transition raises StateError."""
        if to not in _LEGAL.get(self.state, set()):
            raise StateError(f"request {self.id}: {self.state} cannot become {to}")
        self.state = to

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_ids) + len(self.output_ids)

    @property
    def token_ids(self) -> list[int]:
        return [*self.prompt_ids, *self.output_ids]

    def news(self) -> dict[str, Any]:
        """What its next Output says of it beside tokens; `facts` only when they are others than those told last."""
        now = Facts(self.preemptions, self.drafted, self.accepted, dict(self.waits), dict(self.tiers))
        known, self.told = self.told, now
        return {"cached_tokens": self.num_cached, "facts": None if now == known else now}

    def wire(self) -> dict[str, Any]:
        """The fields that cross a process, enough to continue the same text elsewhere; the deadline as seconds left."""
        left = None if self.deadline is None else self.deadline - time.monotonic()
        names: tuple[str, ...] = (
            "id",
            "prompt_ids",
            "params",
            "sample",
            "priority",
            "salt",
            "adapter",
            "output_ids",
            "seed",
        )
        names += ("pooling", "types")
        return {name: getattr(self, name) for name in names} | {"seconds_left": left}


class TokenOut(msgspec.Struct, frozen=True):
    """One token and what the model thought of it; `top` holds (id, log-probability) of the alternatives, best first."""

    id: int
    logprob: float | None = None
    rank: int | None = None
    top: tuple[tuple[int, float], ...] = ()


class Beam(msgspec.Struct, frozen=True):
    """One finished sequence of a beam search: its tokens, the sum of their log-probabilities as the search counted
    them, its score (that sum over a power of its length), and how it ended."""

    tokens: tuple[TokenOut, ...]
    cumulative_logprob: float
    score: float
    finish: State
    stop_reason: int | None = None


class Output(msgspec.Struct, frozen=True):
    """What one engine step adds to one request. `finish` is set once, with the last tokens.

    A beam search says nothing before its end; its last Output has `beams`, the best first, and no `tokens`.

    `prompt` holds log-probabilities of the prompt's tokens, the first being None, sent once when they were asked for.
    `stop_reason` is the stop token's id when one ended the request. `version` is that of the weights that made the
    tokens. `pooled` is what was asked of a text that is not continued. `param` is the request's field at fault for an
    `error`, when it is the request's own. `facts` are those of the request so far, None
    while nothing has changed in them.
    """

    request_id: str
    tokens: tuple[TokenOut, ...] = ()
    finish: State | None = None
    stop_reason: int | str | None = None
    prompt: tuple[TokenOut, ...] | None = None
    cached_tokens: int = 0
    error: str | None = None
    version: int = 0
    pooled: Pooled | None = None
    param: str | None = None
    beams: tuple[Beam, ...] = ()
    facts: Facts | None = None

    def parts(self, count: int) -> list[Output]:
        """What it says to each of `count` sequences of its request: a beam each at the end of a search, else itself.

        Where there are fewer different sequences than asked for, the rest say nothing.
        """
        if not self.beams:
            return [self] * count
        parts = [
            replace(self, tokens=beam.tokens, finish=beam.finish, stop_reason=beam.stop_reason, beams=(beam,))
            for beam in self.beams[:count]
        ]
        return parts + [replace(self, finish=State.STOP, beams=())] * (count - len(parts))
