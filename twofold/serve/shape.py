"""Pieces of text and log-probabilities in the shapes of OpenAI's answers, whole or streamed.

A completion and a chat differ only in these shapes; `Shape` is what the two have in common.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from msgspec import UNSET, UnsetType

from ..data import Tokenizer
from ..data.speech import Argued, Called, Heard, Said, Thought
from ..engine.request import TokenOut
from . import answers as a
from .calls import Call
from .choice import Piece

LOWEST = -9999.0  # JSON has no infinity


@dataclass
class Shape:
    """How one call's answer is to look. `logprobs` is how many alternatives, None for no log-probabilities.

    `echo` holds what stands before each choice's text, `scores_only` drops what was generated.
    """

    id: str
    model: str
    tokenizer: Tokenizer
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    token_ids: bool = False
    as_ids: bool = False
    usage_in_stream: bool = False
    usage_in_every: bool = False
    echo: Sequence[str] = ()
    scores_only: bool = False
    created: int = field(default_factory=lambda: int(time.time()))

    # -- tokens -----------------------------------------------------------------------------------------------------

    def token(self, token: int) -> str:
        return f"token_id:{token}" if self.as_ids else self.tokenizer.token_bytes(token).decode("utf-8", "replace")

    def bytes(self, token: int) -> list[int]:
        return list(self.tokenizer.token_bytes(token))

    def best(self, token: TokenOut, most: int) -> list[tuple[int, float]]:
        """The alternatives asked for, the token itself among them."""
        found = [(name, logprob) for name, logprob in token.top[:most]]
        if token.logprob is not None and all(name != token.id for name, _ in found):
            found.append((token.id, token.logprob))
        return found

    def prompt(self, tokens: Iterable[TokenOut]) -> a.PromptLogprobs:
        """vLLM's `prompt_logprobs`: for each prompt token its alternatives by id; null for the first."""
        most = self.prompt_logprobs or 0
        return [None if token.logprob is None else self._ranked(token, most) for token in tokens]

    def _ranked(self, token: TokenOut, most: int) -> dict[str, a.PromptLogprob]:
        ranks = {name: place for place, (name, _) in enumerate(token.top, 1)}
        return {
            str(name): a.PromptLogprob(
                max(logprob, LOWEST), token.rank if name == token.id else ranks.get(name), self.token(name)
            )
            for name, logprob in self.best(token, most)
        }

    # -- usage ------------------------------------------------------------------------------------------------------

    def usage(self, call: Call) -> a.Usage:
        usage = call.usage
        if self.scores_only:
            usage.completion_tokens, usage.total_tokens = 0, usage.prompt_tokens
        return usage

    def running_usage(self, call: Call) -> a.Usage | UnsetType | None:
        """The usage field of a chunk that is not the last: null, once the client asked for usage at all."""
        if not self.usage_in_stream:
            return UNSET
        if not self.usage_in_every:
            return None
        usage = self.usage(call)
        usage.timings = UNSET  # they come with the last
        return usage

    def worth(self, piece: Piece) -> bool:
        """Whether a piece has anything to show."""
        needs_tokens = self.logprobs is not None or self.token_ids
        says = piece.text if piece.said is None else piece.said
        return bool(says or piece.finish or piece.prompt is not None or (needs_tokens and piece.tokens))

    def parts(self, piece: Piece) -> list[Piece]:
        """A piece as the events of a stream that it becomes: one thing said each, tokens and the end with the last."""
        said = piece.said or []
        if len(said) < 2:
            return [piece]
        parts = [replace(piece, tokens=[], prompt=None, finish=None, stop_reason=None, said=[one]) for one in said]
        parts[0].prompt, parts[-1].tokens = piece.prompt, piece.tokens
        parts[-1].finish, parts[-1].stop_reason = piece.finish, piece.stop_reason
        return parts


class TextShape(Shape):
    """`/v1/completions`."""

    def whole(self, call: Call, pieces: Sequence[list[Piece]]) -> a.Text:
        choices = [self._choice(call, merge(parts), whole=True) for parts in pieces]
        return a.Text(self.id, self.created, self.model, choices, usage=self.usage(call))

    def opening(self, call: Call) -> list[a.Text]:
        """What a stream begins with: nothing, or the echo when no log-probabilities have to be waited for."""
        if not self.echo or self.logprobs is not None:
            return []
        choices = [a.TextChoice(i, text) for i, text in enumerate(self._echoes(call))]
        return [a.Text(self.id, self.created, self.model, choices, usage=self.running_usage(call))]

    def chunk(self, call: Call, pieces: Sequence[Piece]) -> a.Text:
        choices = [self._choice(call, piece, whole=False) for piece in pieces]
        return a.Text(self.id, self.created, self.model, choices, usage=self.running_usage(call))

    def closing(self, call: Call) -> list[a.Text]:
        if not self.usage_in_stream:
            return []
        return [a.Text(self.id, self.created, self.model, [], usage=self.usage(call))]

    def _choice(self, call: Call, piece: Piece, *, whole: bool) -> a.TextChoice:
        prompt = piece.prompt
        echo = self._echoes(call)[piece.index] if self.echo else ""
        first = whole or (prompt is not None and self.logprobs is not None)
        tokens = [] if self.scores_only else piece.tokens
        text = "" if self.scores_only else piece.text
        found = a.TextChoice(piece.index, (echo if first else "") + text, finish_reason=piece.finish)
        found.stop_reason = piece.stop_reason
        found.structured_output_error = piece.form_error or UNSET
        if self.scores_only and piece.finish:
            found.finish_reason = "length"
        if self.logprobs is not None:
            found.logprobs = a.TextLogprobs([], [], [], [])
            if self.echo and prompt is not None:
                self._score(found.logprobs, prompt, 0)
            self._score(found.logprobs, tokens, len(echo) + piece.offset)
        if self.token_ids:
            found.token_ids = [token.id for token in tokens]
            if whole:
                found.prompt_token_ids = list(call.choices[piece.index].request.prompt_ids)
        if self.prompt_logprobs is not None and prompt is not None:
            found.prompt_logprobs = self.prompt(prompt)
        _tell_beam(found, piece)
        return found

    def _score(self, into: a.TextLogprobs, tokens: Iterable[TokenOut], offset: int) -> None:
        for token in tokens:
            text = self.token(token.id)
            into.tokens.append(text)
            into.token_logprobs.append(None if token.logprob is None else max(token.logprob, LOWEST))
            into.text_offset.append(offset)
            offset += len(text)
            if token.logprob is None:
                into.top_logprobs.append(None)
                continue
            top: dict[str, float] = {}
            for name, logprob in self.best(token, self.logprobs or 0):
                top.setdefault(self.token(name), max(logprob, LOWEST))  # ids that look alike: the likelier stays
            into.top_logprobs.append(top)

    def _echoes(self, call: Call) -> list[str]:
        each = len(call.choices) // len(self.echo)
        return [text for text in self.echo for _ in range(each)]


class ChatShape(Shape):
    """`/v1/chat/completions`."""

    def whole(self, call: Call, pieces: Sequence[list[Piece]]) -> a.Chat:
        chat = a.Chat(self.id, self.created, self.model, [], self.usage(call))
        for parts in pieces:
            piece = merge(parts)
            choice = a.ChatChoice(piece.index, _message(piece), self._scores(piece), piece.finish, piece.stop_reason)
            choice.structured_output_error = piece.form_error or UNSET
            if self.token_ids:
                choice.token_ids = [token.id for token in piece.tokens]
            _tell_beam(choice, piece)
            chat.choices.append(choice)
            if self.prompt_logprobs is not None and piece.prompt is not None:
                chat.prompt_logprobs = self.prompt(piece.prompt)
        if self.token_ids:
            chat.prompt_token_ids = call.prompts[0]
        return chat

    def opening(self, call: Call) -> list[a.Chunk]:
        """OpenAI's first chunk of each choice: the role, and no text yet."""
        first = [a.ChunkChoice(choice.index, a.Delta("", "assistant")) for choice in call.choices]
        chunk = a.Chunk(self.id, self.created, self.model, first, usage=self.running_usage(call))
        if self.token_ids:
            chunk.prompt_token_ids = call.prompts[0]
        return [chunk]

    def chunk(self, call: Call, pieces: Sequence[Piece]) -> a.Chunk:
        chunk = a.Chunk(self.id, self.created, self.model, [], usage=self.running_usage(call))
        for piece in pieces:
            choice = a.ChunkChoice(piece.index, _delta(piece), self._scores(piece))
            choice.finish_reason, choice.stop_reason = piece.finish, piece.stop_reason
            choice.structured_output_error = piece.form_error or UNSET
            if self.token_ids:
                choice.token_ids = [token.id for token in piece.tokens]
            chunk.choices.append(choice)
            if self.prompt_logprobs is not None and piece.prompt is not None:
                chunk.prompt_logprobs = self.prompt(piece.prompt)
        return chunk

    def closing(self, call: Call) -> list[a.Chunk]:
        return [a.Chunk(self.id, self.created, self.model, [], usage=self.usage(call))] if self.usage_in_stream else []

    def _scores(self, piece: Piece) -> a.ChatLogprobs | None:
        if self.logprobs is None or not piece.tokens:
            return None
        return a.ChatLogprobs([self._score(token) for token in piece.tokens if token.logprob is not None])

    def _score(self, token: TokenOut) -> a.ChatLogprob:
        top = [
            a.TopLogprob(self.token(name), max(logprob, LOWEST), self.bytes(name))
            for name, logprob in token.top[: self.logprobs or 0]
        ]
        return a.ChatLogprob(self.token(token.id), max(token.logprob or 0.0, LOWEST), self.bytes(token.id), top)


def _tell_beam(choice: a.TextChoice | a.ChatChoice, piece: Piece) -> None:
    if piece.beam is not None:
        choice.cumulative_logprob, choice.beam_score = piece.beam.cumulative_logprob, piece.beam.score


def _message(piece: Piece) -> a.ChatMessage:
    if piece.said is None:
        return a.ChatMessage(piece.text)
    heard = Heard().add(piece.said)
    message = a.ChatMessage(None if heard.calls and not heard.content else heard.content)
    if heard.thought:
        message.reasoning_content = message.reasoning = heard.thought
    if heard.calls:
        message.tool_calls = [
            a.ToolCall(a.CalledFunction(name, arguments), id=_call_id(), type="function")
            for name, arguments in heard.calls
        ]
    return message


def _delta(piece: Piece) -> a.Delta:
    if piece.said is None:
        return a.Delta(piece.text)
    calls: dict[int, a.ToolCall] = {}
    content = "".join(event.text for event in piece.said if isinstance(event, Said))
    thought = "".join(event.text for event in piece.said if isinstance(event, Thought))
    delta = a.Delta(content or UNSET, reasoning_content=thought or UNSET, reasoning=thought or UNSET)
    for event in piece.said:
        match event:
            case Called(index, name):
                calls[index] = a.ToolCall(a.CalledFunction(name), index, _call_id(), "function")
            case Argued(index, text):
                call = calls.setdefault(index, a.ToolCall(a.CalledFunction(), index))
                call.function.arguments += text
    if calls:
        delta.tool_calls = list(calls.values())
    return delta


def _call_id() -> str:
    return f"call_{secrets.token_hex(12)}"


def merge(pieces: Sequence[Piece]) -> Piece:
    """Several pieces of one choice as one."""
    first, last = pieces[0], pieces[-1]
    return Piece(
        first.index,
        first.offset,
        "".join(piece.text for piece in pieces),
        [token for piece in pieces for token in piece.tokens],
        next((piece.prompt for piece in pieces if piece.prompt is not None), None),
        last.finish,
        last.stop_reason,
        last.form_error,
        None if first.said is None and last.said is None else [one for piece in pieces for one in piece.said or ()],
        last.beam,
    )


def by_choice(pieces: Iterable[Piece]) -> list[Piece]:
    """What one batch says, one piece a choice: so one event carries all that came at once."""
    found: dict[int, list[Piece]] = {}
    for piece in pieces:
        found.setdefault(piece.index, []).append(piece)
    return [merge(found[index]) for index in sorted(found)]
