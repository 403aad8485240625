"""Limits: what a request may be on this engine, checked once at the door, with an answer that says what would fit."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ..core import CapacityError, RequestError
from .request import Request


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """The context in tokens, the vocabulary, and how many tokens the whole cache can hold."""

    max_model_len: int
    vocab: int
    cache_tokens: int

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
        fits = self.cache_tokens + 1 - prompt
        if fits < 1 or (asked is not None and min(asked, room) > fits):
            wants = f"with max_tokens {min(asked, room)}" if asked is not None else "with any answer"
            cure = f"lower max_tokens to {fits}" if fits >= 1 else f"send at most {self.cache_tokens} tokens"
            raise CapacityError(
                f"a prompt of {prompt} tokens {wants} outgrows the KV cache of {self.cache_tokens} tokens: "
                f"{cure}, or start with a larger kv_cache_memory_bytes"
            )
        return min(room, fits) if asked is None else min(asked, room)

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
