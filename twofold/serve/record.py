"""Record: what became of one API call: times, counts, settings; never a text, a token or a key.

    began ──front──▶ submitted ──queue──▶ started ──prefill──▶ first token ──decode──▶ ended

The four parts follow one another without a gap, so they add up to the whole. Of several sequences the earliest counts.
"""

from __future__ import annotations

import asyncio
import dataclasses
import re
import time
from collections.abc import Sequence
from typing import Any, Protocol

import msgspec
from starlette.requests import ClientDisconnect, Request

from ..core import TwofoldError
from ..engine.facts import Facts
from ..engine.sampling import SamplingParams
from .errors import HttpError
from .fate import Fate

TRACEPARENT = re.compile(r"(?!ff)[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")
MOST_PARTS = 16
CUT = 64  # characters of an id

# The sampling settings that are told: numbers and switches, nothing that a prompt could be read from.
SETTINGS = (
    *("n", "best_of", "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty"),
    *("repetition_penalty", "seed", "max_tokens", "min_tokens", "ignore_eos", "logprobs", "prompt_logprobs"),
    *("logprobs_mode", "use_beam_search", "beam_width", "length_penalty", "early_stopping"),
)
COUNTED = ("stop", "stop_token_ids", "logit_bias", "allowed_token_ids", "bad_words", "bad_words_ids")


class Timings(msgspec.Struct):
    """Seconds by part, and what they were spent on. `waits` are seconds by reason: those of engine/facts.py, "restart"
    (its process had died) and "compile" (a grammar, before the request was accepted). `cached_tiers` are tokens that
    were found beyond the pool, by tier."""

    front_seconds: float
    queue_seconds: float
    prefill_seconds: float
    decode_seconds: float
    total_seconds: float
    first_token_seconds: float | None
    tokens_per_second: float | None
    cached_tokens: int
    preemptions: int
    drafted_tokens: int
    accepted_tokens: int
    restarts: int
    waits: dict[str, float] = {}
    cached_tiers: dict[str, int] = {}


class PartFacts(msgspec.Struct):
    """One sequence of a call."""

    output_tokens: int
    cached_tokens: int
    finish_reason: str | None
    first_token_seconds: float | None
    preemptions: int
    restarts: int


class RequestFacts(msgspec.Struct):
    """A call as /requests tells of it; `state` is waiting, running or finished. `settings` are those unlike the
    defaults, lists by their length."""

    id: str
    path: str
    model: str
    state: str
    created_at: float
    prompts: int
    prompt_tokens: int
    output_tokens: int
    timings: Timings
    settings: dict[str, Any]
    sequences: list[PartFacts]
    adapter: str | None = None
    stream: bool = False
    status: int | None = None
    finish_reasons: list[str] = []
    error: str | None = None
    trace_id: str | None = None
    object: str = "request"


class Part(Protocol):
    """A sequence as it goes; `fate` is how it fares in the engine."""

    fate: Fate
    tokens: int
    cached: int
    finish: str | None
    first_token: float | None


@dataclasses.dataclass(slots=True)
class Read:
    """The `Part` that is a text to be read whole."""

    fate: Fate
    tokens: int = 0
    cached: int = 0
    finish: str | None = None
    first_token: float | None = None


class Record:
    """Live until `end`, then what is left of it: one struct of plain values."""

    def __init__(self, request: Request, model: str, *, name: str | None = None, adapter: str | None = None) -> None:
        scope = request.scope
        self.id: str = (name or scope["request_id"])[:CUT]
        self.owner: str = scope["owner"]
        self.path: str = scope["path"]
        self.model = model
        self.adapter = adapter
        self.stream = False
        self.began: float = scope.get("began", time.monotonic())
        self.created_at = time.time() - (time.monotonic() - self.began)
        self.parent = trace_parent(request)
        self.trace_id: str | None = self.parent[0] if self.parent else None
        self.submitted: float | None = None
        self.ended: float | None = None
        self.compiling: float = scope.get("grammar_seconds", 0.0)
        self.prompts: list[int] = []
        self.settings: dict[str, Any] = {}
        self.asked: dict[str, Any] = {}  # as settings, the defaults too: what a trace tells of
        self.instants: tuple[float, ...] = ()
        self.status: int | None = None
        self.error: str | None = None
        self.span: Any = None
        scope["record"] = self  # for the line of the access log
        self._parts: Sequence[Part] = ()
        self._told: RequestFacts | None = None

    def submit(self, prompts: Sequence[int], parts: Sequence[Part], params: SamplingParams | None) -> None:
        """The engine has it: prompts of so many tokens, and the sequences that they become."""
        self.submitted = time.monotonic()
        self.prompts, self._parts = list(prompts), parts
        if params is not None:
            self.settings = settings(params)
            self.asked = {name: getattr(params, name) for name in ("n", "temperature", "top_p", "max_tokens")}

    def end(self, error: BaseException | None) -> None:
        """It is over, with the status that `error` is answered with; lets go of everything but the facts."""
        if self.ended is not None:
            return
        self.ended = time.monotonic()
        self.status = status_of(error)
        if error is not None and self.status != 499:
            self.error = error.code if isinstance(error, HttpError) and error.code else type(error).__name__
        self.instants, self._told = self.marks(), self.told()
        self._parts = ()

    def refuse(self, error: HttpError) -> None:
        self.status, self.ended, self.error = error.status, time.monotonic(), error.code
        self._told = self.told()

    # -- what is told -----------------------------------------------------------------------------------------------

    def marks(self) -> tuple[float, float, float, float, float]:
        """The five instants, each at least the one before; what has not been yet is now, or the end."""
        end = self.ended or time.monotonic()
        started = [part.fate.started for part in self._parts if part.fate.started is not None]
        first = [part.first_token for part in self._parts if part.first_token is not None]
        submitted = min(self.submitted or end, end)
        begun = min(max(min(started, default=min(first, default=end)), submitted), end)
        return self.began, submitted, begun, min(max(min(first, default=end), begun), end), end

    @property
    def facts(self) -> Facts:
        return sum((part.fate.facts for part in self._parts), Facts())

    def timings(self) -> Timings:
        began, submitted, started, first, end = self.marks()
        facts, parts = self.facts, self._parts
        tokens = sum(part.tokens for part in parts)
        spoke = sum(part.first_token is not None for part in parts)
        lost = sum(part.fate.lost for part in parts)
        waits = {**facts.waits, **({"restart": lost} if lost else {})}
        if self.compiling >= 1e-3:
            waits["compile"] = self.compiling
        decode = end - first
        return Timings(
            front_seconds=_short(submitted - began),
            queue_seconds=_short(started - submitted),
            prefill_seconds=_short(first - started),
            decode_seconds=_short(decode),
            total_seconds=_short(end - began),
            first_token_seconds=_short(first - began) if spoke else None,
            tokens_per_second=round((tokens - spoke) / decode, 2) if tokens > spoke and decode > 0 else None,
            cached_tokens=max((part.cached for part in parts), default=0),
            preemptions=facts.preemptions,
            drafted_tokens=facts.drafted,
            accepted_tokens=facts.accepted,
            restarts=sum(part.fate.deaths for part in parts),
            waits={name: _short(seconds) for name, seconds in waits.items()},
            cached_tiers=facts.tiers,
        )

    def told(self) -> RequestFacts:
        if self._told is not None:
            return self._told
        parts = self._parts
        running = any(part.fate.started is not None for part in parts)
        state = "finished" if self.ended is not None else "running" if running else "waiting"
        return RequestFacts(
            id=self.id,
            path=self.path,
            model=self.model,
            adapter=self.adapter,
            stream=self.stream,
            state=state,
            created_at=round(self.created_at, 3),
            prompts=len(self.prompts),
            prompt_tokens=sum(self.prompts),
            output_tokens=sum(part.tokens for part in parts),
            timings=self.timings(),
            settings=self.settings,
            sequences=[self._part(part) for part in parts[:MOST_PARTS]],
            status=self.status,
            finish_reasons=sorted({part.finish for part in parts if part.finish is not None}),
            error=self.error,
            trace_id=self.trace_id,
        )

    def _part(self, part: Part) -> PartFacts:
        first = None if part.first_token is None else _short(part.first_token - self.began)
        facts = part.fate.facts
        return PartFacts(part.tokens, part.cached, part.finish, first, facts.preemptions, part.fate.deaths)


def settings(params: SamplingParams) -> dict[str, Any]:
    """What was asked of the sampler: numbers that are not the default's, how many of each list, the form's name."""
    usual = SamplingParams()
    found = {name: getattr(params, name) for name in SETTINGS if getattr(params, name) != getattr(usual, name)}
    found["max_tokens"] = params.max_tokens
    found |= {name: len(getattr(params, name)) for name in COUNTED if getattr(params, name)}
    if params.structured_outputs is not None:
        found["structured_outputs"] = params.structured_outputs.form
    return found


def status_of(error: BaseException | None) -> int:
    """The HTTP status that tells of it; 499, as nginx has it, for a client that left."""
    if error is None:
        return 200
    if isinstance(error, (ClientDisconnect, asyncio.CancelledError, GeneratorExit)):
        return 499
    if isinstance(error, (HttpError, TwofoldError)):
        return HttpError.of(error).status
    return 500


def trace_parent(request: Request) -> tuple[str, str, int] | None:
    """Trace id, span id and flags of the caller's W3C traceparent header, when there is one and it is well made."""
    given = request.headers.getlist("traceparent")
    match = TRACEPARENT.fullmatch(given[0].strip()) if len(given) == 1 else None
    return (match[1], match[2], int(match[3], 16)) if match else None


def _short(seconds: float) -> float:
    return round(max(seconds, 0.0), 6)
