"""Token in, token out: POST /inference/v1/generate (vLLM's name), with no tokenizer on the path.

For callers that have the tokenizer themselves: trainers, routers, other engines. What comes back are ids and numbers.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec
from msgspec import UNSET, UnsetType
from starlette.requests import Request
from starlette.routing import BaseRoute, Route

from ..core import RequestError
from ..engine.request import TokenOut
from ..engine.sampling import EarlyStopping, LogprobsMode, SamplingParams
from .answers import Usage, json
from .bodies import decode
from .calls import Call
from .choice import Piece
from .openai import MAX_TEXT, check_stream
from .shape import LOWEST, merge
from .stream import EventStream, whole

if TYPE_CHECKING:
    from .app import Api


class GenerateParams(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """SamplingParams without the fields that need text; None means its default."""

    n: int | None = None
    best_of: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    logprobs_mode: LogprobsMode | None = None
    logit_bias: dict[int, float] | None = None
    allowed_token_ids: list[int] | None = None
    bad_words_ids: list[list[int]] | None = None
    use_beam_search: bool | None = None
    beam_width: int | None = None
    length_penalty: float | None = None
    early_stopping: EarlyStopping | None = None

    def params(self) -> SamplingParams:
        """Raises RequestError, naming the field within `sampling_params`."""
        found = {name: value for name, value in msgspec.structs.asdict(self).items() if value is not None}
        if self.use_beam_search:
            found.setdefault("temperature", 0.0)
        try:
            return SamplingParams(**found)
        except RequestError as error:
            error.param = f"sampling_params.{error.param}"
            raise


class GenerateRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """POST /inference/v1/generate. `token_ids` is one prompt, or several."""

    token_ids: list[int | list[int]]
    sampling_params: GenerateParams = msgspec.field(default_factory=GenerateParams)
    model: str | None = None
    request_id: str | None = None
    stream: bool = False
    cache_salt: str | None = None
    priority: int | None = None
    timings: bool | None = None

    def prompts(self, most: int) -> list[list[int]]:
        """Raises RequestError: none, too many, or an id that is none."""
        several = [given for given in self.token_ids if isinstance(given, list)]
        one = [given for given in self.token_ids if isinstance(given, int)]
        if several and one:
            raise RequestError("token_ids holds ids, or lists of ids, and not both", "token_ids")
        prompts = several or [one]
        if len(prompts) > most:
            raise RequestError(f"token_ids holds {len(prompts)} prompts, at most {most}: split it", "token_ids")
        if not all(prompts):
            raise RequestError("a prompt has no tokens: send at least one", "token_ids")
        return prompts

    def check(self) -> None:
        """What no single field can say; raises RequestError."""
        for name in ("request_id", "cache_salt"):
            text = getattr(self, name)
            if text is not None and not (0 < len(text) <= MAX_TEXT and text.isprintable()):
                raise RequestError(f"{name} must be 1 to {MAX_TEXT} printable characters", name)
        if self.priority is not None and not -(2**31) <= self.priority < 2**31:
            raise RequestError(f"priority must be in [-2^31, 2^31), not {self.priority}", "priority")
        if self.stream:
            check_stream(self.sampling_params)


class Scored(msgspec.Struct):
    """A token's log-probability and rank, and the most likely ones as (id, log-probability)."""

    token_id: int
    logprob: float | None
    rank: int | None = None
    top: list[tuple[int, float]] = []


class GenerateChoice(msgspec.Struct):
    index: int
    token_ids: list[int]
    logprobs: list[Scored] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    prompt_logprobs: list[Scored] | UnsetType = UNSET
    cumulative_logprob: float | UnsetType = UNSET
    beam_score: float | UnsetType = UNSET


class GenerateAnswer(msgspec.Struct):
    """The answer, and a piece of one when it is streamed; `usage` comes with the last."""

    request_id: str
    model: str
    choices: list[GenerateChoice]
    usage: Usage | UnsetType = UNSET


@dataclass
class IdShape:
    """How an answer in ids looks."""

    id: str
    model: str
    logprobs: int | None
    prompt_logprobs: int | None

    def whole(self, call: Call, pieces: Sequence[list[Piece]]) -> GenerateAnswer:
        choices = [self._choice(merge(parts)) for parts in pieces]
        return GenerateAnswer(self.id, self.model, choices, call.usage)

    def opening(self, call: Call) -> list[GenerateAnswer]:
        return []

    def worth(self, piece: Piece) -> bool:
        return bool(piece.tokens or piece.finish or piece.prompt is not None)

    def parts(self, piece: Piece) -> list[Piece]:
        return [piece]

    def chunk(self, call: Call, pieces: Sequence[Piece]) -> GenerateAnswer:
        return GenerateAnswer(self.id, self.model, [self._choice(piece) for piece in pieces])

    def closing(self, call: Call) -> list[GenerateAnswer]:
        return [GenerateAnswer(self.id, self.model, [], call.usage)]

    def _choice(self, piece: Piece) -> GenerateChoice:
        found = GenerateChoice(piece.index, [token.id for token in piece.tokens])
        found.finish_reason, found.stop_reason = piece.finish, piece.stop_reason
        if self.logprobs is not None:
            found.logprobs = _scored(piece.tokens, self.logprobs)
        if self.prompt_logprobs is not None and piece.prompt is not None:
            found.prompt_logprobs = _scored(piece.prompt, self.prompt_logprobs)
        if piece.beam is not None:
            found.cumulative_logprob, found.beam_score = piece.beam.cumulative_logprob, piece.beam.score
        return found


def _scored(tokens: Iterable[TokenOut], most: int) -> list[Scored]:
    return [
        Scored(
            token.id,
            None if token.logprob is None else max(token.logprob, LOWEST),
            token.rank,
            [(name, max(logprob, LOWEST)) for name, logprob in token.top[:most]],
        )
        for token in tokens
    ]


class Generate:
    """The one route."""

    def __init__(self, api: Api) -> None:
        self.api = api

    def routes(self) -> list[BaseRoute]:
        return [Route("/inference/v1/generate", self.generate, methods=["POST"])]

    async def generate(self, request: Request) -> Any:
        api = self.api
        body = decode(GenerateRequest, await request.body())
        body.check()
        api.check_model(body.model)
        params, prompts = body.sampling_params.params(), body.prompts(api.config.limits.prompts)
        name = body.request_id or request.scope["request_id"]
        shape = IdShape(name, api.config.name, params.logprobs, params.prompt_logprobs)
        call = api.call(request, body, prompts, params, None)
        if body.stream:
            return EventStream(call, shape, api.config.ping_seconds)
        return json(await whole(request, call, shape))
