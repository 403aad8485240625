"""Limits: what a request may be on this engine, checked once at the door, with an answer that says what would fit."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ..core import CapacityError, RequestError
from .request import Request


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """The context in tokens, the vocabulary, and how many tokens the whole cache can hold.

    `max_seqs` requests run at once; a beam search takes the seats of its beams, and blocks of `block_size` for each.
    """

    max_model_len: int
    vocab: int
    cache_tokens: int
    block_size: int = 1
    max_seqs: int | None = None

    def room(self, request: Request) -> int:
        """How many tokens the request may produce, outputs it arrived with included.

        Raises:
            RequestError: an empty or too long prompt, or a token id outside the vocabulary.
            CapacityError: it fits the context, but could outgrow the whole cache.
        """
        self._check_ids(request)
        prompt, asked = len(request.prompt_ids), request.params.max_tokens
        if not prompt:
            raise RequestError("the prompt has no tokens: send at least one", "prompt")
        if prompt >= self.max_model_len:
            raise RequestError(
                f"the prompt has {prompt} tokens and the context {self.max_model_len}, which must hold an answer too: "
                f"send at most {self.max_model_len - 1} tokens",
                "prompt",
            )
        room = self.max_model_len - prompt
        # The last token of an answer is never read again, so the cache need not hold it.
        fits = self._reach(prompt, self._beams(request)) + 1 - prompt
        if fits < 1 or (asked is not None and min(asked, room) > fits):
            wants = f"with max_tokens {min(asked, room)}" if asked is not None else "with any answer"
            cure = f"lower max_tokens to {fits}" if fits >= 1 else f"send at most {self.cache_tokens} tokens"
            beams = f" and {self._beams(request)} beams" if request.params.use_beam_search else ""
            raise CapacityError(
                f"a prompt of {prompt} tokens {wants}{beams} outgrows the KV cache of {self.cache_tokens} tokens: "
                f"{cure}, or start with a larger kv_cache_memory_bytes"
            )
        return min(room, fits) if asked is None else min(asked, room)

    def _beams(self, request: Request) -> int:
        """How many sequences the request works on at once; raises RequestError when that is too many to run."""
        if not request.params.use_beam_search:
            return 1
        width = request.params.width
        if self.max_seqs is not None and width > self.max_seqs:
            raise RequestError(
                f"{width} beams run side by side, and this engine runs {self.max_seqs} sequences: ask for fewer",
                "beam_width",
            )
        return width

    def _reach(self, prompt: int, beams: int) -> int:
        """How many tokens each of so many sequences of one prompt may have: they share the prompt's full blocks."""
        if beams == 1:
            return self.cache_tokens
        shared, blocks = prompt // self.block_size, self.cache_tokens // self.block_size
        return (shared + (blocks - shared) // beams) * self.block_size

    def check_text(self, request: Request, types: int) -> None:
        """Whether a text can be read whole, its tokens of one of `types` types.

        Raises:
            RequestError: no tokens, more than the context, or ids or types that are not there.
        """
        ids, most = request.prompt_ids, self.max_model_len
        if not ids:
            raise RequestError("a text has no tokens: send at least one", "input")
        if len(ids) > most:
            raise RequestError(
                f"a text has {len(ids)} tokens and the context is {most}: send fewer, or truncate_prompt_tokens",
                "input",
            )
        low, high = min(ids), max(ids)
        if low < 0 or high >= self.vocab:
            wrong = low if low < 0 else high
            raise RequestError(f"input holds token id {wrong}; the vocabulary is 0 to {self.vocab - 1}", "input")
        told = request.types
        if told and (len(told) != len(ids) or not 0 <= min(told) <= max(told) < types):
            raise RequestError(f"token types are one for each token, from 0 to {types - 1}", "types")

    def _check_ids(self, request: Request) -> None:
        params = request.params
        fields: tuple[tuple[str, Iterable[int]], ...] = (
            ("prompt", request.prompt_ids),
            ("prompt", request.output_ids),
            ("stop_token_ids", params.stop_token_ids),
            ("allowed_token_ids", params.allowed_token_ids or ()),
            ("logit_bias", params.logit_bias),
            ("bad_words", [token for word in params.bad_words_ids for token in word]),
        )
        for name, ids in fields:
            low, high = min(ids, default=0), max(ids, default=0)
            if low < 0 or high >= self.vocab:
                wrong = low if low < 0 else high
                raise RequestError(f"{name} holds token id {wrong}; the vocabulary is 0 to {self.vocab - 1}", name)
