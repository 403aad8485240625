"""What a caller may ask of the sampler, checked at once and free of torch.

Names and meanings are those of the OpenAI API and of vLLM's SamplingParams, so that clients carry over.
The order in which the sampler applies them is written in `sampler.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from ..core import RequestError
from .structured import StructuredOutputs

LogprobsMode = Literal["raw", "tempered", "processed"]
EarlyStopping = bool | Literal["never"]

MAX_LOGPROBS = 20
MAX_N = 16
MAX_BEAMS = 32
MAX_BAD_WORDS = 256
MAX_BAD_WORD_BYTES = 256
MAX_STOPS = 16
MAX_STOP_BYTES = 256
MAX_LOGIT_BIAS = 1024


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """How tokens are chosen and when a request ends.

    Temperature 0 is greedy. `top_k` 0 or -1 is off. `logprobs` asks for that many alternatives besides the sampled
    token (0: that one alone). `logprobs_mode` "raw" reports the model's distribution, "tempered" that one at the
    temperature, before any edit or cut, "processed" the one sampled from. `seed` None lets `Request` draw one.
    `max_tokens` None means: up to the model's context. `structured_outputs` is the form that the text must have.

    `best_of` makes that many samples and keeps the `n` with the highest mean log-probability. `bad_words` may not come;
    whoever has the tokenizer turns them into `bad_words_ids`, which is what the engine reads: each of these sequences
    is banned at its last token.

    `use_beam_search` looks for the likeliest sequences instead of drawing, as transformers' `generate(num_beams=...)`
    does: `beam_width` beams (else `best_of`, else `n`), of which the `n` best come back. A finished sequence's score is
    the sum of its log-probabilities over its length to the power of `length_penalty`. `early_stopping` True ends when
    there are as many finished sequences as beams, False when no running beam is likely to do better, "never" when none
    can. It takes no temperature, and stop ids instead of stop strings.

    Raises:
        RequestError: naming the field, what was given and what is allowed.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    max_tokens: int | None = 16
    min_tokens: int = 0
    stop: str | tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    logprobs_mode: LogprobsMode = "raw"
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    allowed_token_ids: tuple[int, ...] | None = None
    bad_words: tuple[str, ...] = ()
    bad_words_ids: tuple[tuple[int, ...], ...] = ()
    best_of: int | None = None
    use_beam_search: bool = False
    beam_width: int | None = None
    length_penalty: float = 1.0
    early_stopping: EarlyStopping = False
    structured_outputs: StructuredOutputs | None = None

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):  # the API takes one string or a list
            object.__setattr__(self, "stop", (self.stop,))
        for name in ("stop", "stop_token_ids", "bad_words"):
            object.__setattr__(self, name, tuple(getattr(self, name) or ()))
        object.__setattr__(self, "bad_words_ids", tuple(tuple(ids) for ids in self.bad_words_ids or ()))
        if self.allowed_token_ids is not None:
            object.__setattr__(self, "allowed_token_ids", tuple(self.allowed_token_ids))
        self._check_numbers()
        self._check_lists()
        self._check_bad_words()
        self._check_beams()

    def _check_numbers(self) -> None:
        _within("n", self.n, 1, MAX_N)
        _within("temperature", self.temperature, 0.0, 2.0)
        _within("top_p", self.top_p, 0.0, 1.0, low_open=True)
        _within("top_k", self.top_k, -1, 2**31 - 1)
        _within("min_p", self.min_p, 0.0, 1.0)
        _within("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _within("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _within("repetition_penalty", self.repetition_penalty, 0.0, 1e4, low_open=True)
        _within("min_tokens", self.min_tokens, 0, 2**31 - 1)
        if self.seed is not None:
            _within("seed", self.seed, -(2**63), 2**64 - 1)
        if self.max_tokens is not None:
            _within("max_tokens", self.max_tokens, 1, 2**31 - 1)
            if self.min_tokens > self.max_tokens:
                raise RequestError(
                    f"min_tokens is {self.min_tokens}, more than max_tokens {self.max_tokens}: lower it", "min_tokens"
                )
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                _within(name, getattr(self, name), 0, MAX_LOGPROBS)

    def _check_lists(self) -> None:
        if len(self.stop) > MAX_STOPS or len(self.stop_token_ids) > MAX_STOPS:
            raise RequestError(f"at most {MAX_STOPS} stops, {len(self.stop)} given: send fewer", "stop")
        for text in self.stop:
            if not isinstance(text, str) or not text or len(text.encode("utf-8", "replace")) > MAX_STOP_BYTES:
                raise RequestError(f"a stop is a string of 1 to {MAX_STOP_BYTES} bytes, not {text!r:.40}", "stop")
        for name in ("stop_token_ids", "allowed_token_ids", "logit_bias"):
            _ids(name, getattr(self, name) or ())
        if self.allowed_token_ids is not None and not self.allowed_token_ids:
            raise RequestError("allowed_token_ids is empty: name a token or leave it out", "allowed_token_ids")
        if len(self.logit_bias) > MAX_LOGIT_BIAS:
            raise RequestError(f"logit_bias has {len(self.logit_bias)} entries, at most {MAX_LOGIT_BIAS}", "logit_bias")
        for value in self.logit_bias.values():
            _within("logit_bias", value, -100.0, 100.0)

    def _check_bad_words(self) -> None:
        if len(self.bad_words) > MAX_BAD_WORDS or len(self.bad_words_ids) > 2 * MAX_BAD_WORDS:
            raise RequestError(f"at most {MAX_BAD_WORDS} bad words: send fewer", "bad_words")
        for word in self.bad_words:
            known = isinstance(word, str) and word.strip()
            if not known or len(word.encode("utf-8", "replace")) > MAX_BAD_WORD_BYTES:
                raise RequestError(
                    f"a bad word is text of 1 to {MAX_BAD_WORD_BYTES} bytes, not all blank, not {word!r:.40}",
                    "bad_words",
                )
        for ids in self.bad_words_ids:
            _ids("bad_words_ids", ids)
            if not 1 <= len(ids) <= MAX_BAD_WORD_BYTES:
                raise RequestError(f"a bad word has 1 to {MAX_BAD_WORD_BYTES} tokens, not {len(ids)}", "bad_words_ids")

    def _check_beams(self) -> None:
        for name, most in (("best_of", MAX_BEAMS if self.use_beam_search else MAX_N), ("beam_width", MAX_BEAMS)):
            width = getattr(self, name)
            if width is not None:
                _within(name, width, 1, most)
                if width < self.n:
                    raise RequestError(f"{name} is {width} and n {self.n}: it must be at least n", name)
        _within("length_penalty", self.length_penalty, -100.0, 100.0)
        if self.early_stopping not in (True, False, "never"):
            raise RequestError(
                f"early_stopping is true, false or 'never', not {self.early_stopping!r:.40}", "early_stopping"
            )
        if not self.use_beam_search:
            for name, unset in (("beam_width", None), ("length_penalty", 1.0), ("early_stopping", False)):
                if getattr(self, name) != unset:
                    raise RequestError(f"{name} is for beams: send use_beam_search too, or leave it out", name)
            return
        if not self.greedy:
            raise RequestError(
                f"temperature is {self.temperature:g} and beams are not drawn: send 0, or no use_beam_search",
                "temperature",
            )
        if self.structured_outputs is not None:
            raise RequestError(
                "a beam search follows no grammar: send one of use_beam_search and structured outputs",
                "use_beam_search",
            )
        if self.stop:
            raise RequestError("beams end at token ids, not at text: send stop_token_ids instead of stop", "stop")

    def completes_bad_word(self, recent: tuple[int, ...]) -> tuple[int, ...]:
        """The ids that would end a bad word after these tokens."""
        return tuple(ids[-1] for ids in self.bad_words_ids if recent[len(recent) - len(ids) + 1 :] == ids[:-1])

    @property
    def longest_bad_word(self) -> int:
        """How many tokens back a bad word may begin."""
        return max(map(len, self.bad_words_ids), default=1) - 1

    @property
    def width(self) -> int:
        """How many sequences of one prompt are worked on at once: beams, or samples."""
        return (self.beam_width if self.use_beam_search else None) or self.best_of or self.n

    @property
    def greedy(self) -> bool:
        return self.temperature < 1e-5

    def with_(self, **changes: Any) -> SamplingParams:
        """A copy with some fields changed, checked again."""
        return replace(self, **changes)


def _ids(name: str, ids: Iterable[int]) -> None:
    for token in ids:
        if isinstance(token, bool) or not isinstance(token, int) or token < 0:
            raise RequestError(f"token ids are whole numbers from 0, not {token!r:.40}", name)


def _within(name: str, value: float, low: float, high: float, *, low_open: bool = False) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not number or value > high or value < low or (low_open and value == low):
        bracket = "(" if low_open else "["
        raise RequestError(f"{name} must be in {bracket}{low:g}, {high:g}], not {value!r:.40}", name)
