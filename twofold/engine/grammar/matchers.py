"""Compiled grammars, where each request stands in its own, and the masks from there.

A position's mask is a function of the grammar and of the tokens before it, of nothing else: so a request that is
computed again, or whose drafts are looked at, finds the same masks.
"""

from __future__ import annotations

import re
import threading
from collections import OrderedDict
from collections.abc import Sequence

from llguidance import LLMatcher, LLParserLimits

from ...core import RequestError
from ..structured import StructuredOutputs
from .source import grammar_source
from .vocabulary import Vocabulary

KEPT = 256
"""Compiled grammars that are kept, least recently used out first."""
KEPT_BYTES = 4 << 20
"""And the bytes of their texts, to which their sizes are in proportion."""
LEXER_STATES = 64_000  # 1 to 2 KB each
FORCED_MOST = 64
"""Tokens at most that are told ahead."""


class Matchers:
    """Grammars by their form, compiled once; safe to share between threads."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary
        self._kept: OrderedDict[StructuredOutputs, LLMatcher] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def matcher(self, wanted: StructuredOutputs) -> LLMatcher:
        """A matcher at the start of a form's grammar.

        Raises:
            RequestError: it does not compile, or no text fits it.
        """
        with self._lock:
            found = self._kept.get(wanted)
            if found is not None:
                self._kept.move_to_end(wanted)
                return found.deep_copy()
        made = self._compile(wanted)
        with self._lock:
            if wanted not in self._kept:
                self._bytes += _size(wanted)
            self._kept[wanted] = made
            while len(self._kept) > KEPT or (self._bytes > KEPT_BYTES and len(self._kept) > 1):
                self._bytes -= _size(self._kept.popitem(last=False)[0])
            return made.deep_copy()

    def _compile(self, wanted: StructuredOutputs) -> LLMatcher:
        source = grammar_source(wanted, self.vocabulary.special)
        limits = LLParserLimits(max_lexer_states=LEXER_STATES, verbose_errors=False)
        made = LLMatcher(self.vocabulary.tokens, source, log_level=0, limits=limits)
        if made.is_error():
            raise _refused(wanted, made.get_error())
        mask = self.vocabulary.mask(made.compute_bitmask())  # warms what all its copies share
        if made.is_error():
            raise _refused(wanted, made.get_error())
        if not any(mask) and not made.is_accepting():
            raise _refused(wanted, "the model's vocabulary has no token that a text could begin with")
        return made


class Stand:
    """Where one request stands in its grammar; for one thread at a time."""

    def __init__(self, matchers: Matchers, wanted: StructuredOutputs, ids: Sequence[int]) -> None:
        self._vocabulary = matchers.vocabulary
        self._matcher = matchers.matcher(wanted)
        self.at = 0
        self.advance(ids)

    def advance(self, ids: Sequence[int]) -> None:
        """Go on by these tokens.

        Raises:
            RequestError: the grammar does not allow one of them.
        """
        if ids and not self._matcher.consume_tokens(list(ids)):
            raise RequestError(f"the text does not fit its grammar: {self._matcher.get_error():.200}")
        self.at += len(ids)

    def next(self) -> tuple[tuple[int, ...], bytes]:
        """The tokens that must come, and the mask after them; an empty mask where the text is complete.

        Raises:
            RequestError: the grammar is too costly from here, or allows no token that the model has.
        """
        matcher = self._matcher
        forced: list[int] = [] if matcher.is_stopped() else matcher.compute_ff_tokens()[:FORCED_MOST]
        if forced and max(forced) >= self._vocabulary.size:
            forced = []
        if forced and not matcher.consume_tokens(forced):
            raise self._broken()
        mask = self._mask()
        if forced and not matcher.rollback(len(forced)):
            raise self._broken()
        return tuple(forced), mask

    def along(self, drafts: Sequence[int]) -> tuple[bytes, ...]:
        """The mask here and after each of the drafts that the grammar allows; where it is, it stays."""
        matcher = self._matcher
        masks, taken = [self._mask()], 0
        for draft in drafts:
            if not masks[-1] or not _has(masks[-1], draft) or not matcher.consume_token(draft):
                break
            taken += 1
            masks.append(self._mask())
        if taken and not matcher.rollback(taken):
            raise self._broken()
        return tuple(masks)

    def _mask(self) -> bytes:
        matcher = self._matcher
        if matcher.is_stopped() and not matcher.is_error():
            return b""
        mask = self._vocabulary.mask(matcher.compute_bitmask())
        if matcher.is_error():
            raise self._broken()
        if any(mask):
            return mask
        if matcher.is_accepting():
            return b""  # only an end token that the model has not
        raise RequestError("the grammar allows none of the model's tokens here")

    def _broken(self) -> RequestError:
        return RequestError(f"the grammar could not be followed: {self._matcher.get_error():.200}")


def _has(mask: bytes, token: int) -> bool:
    return 0 <= token >> 3 < len(mask) and bool(mask[token >> 3] >> (token & 7) & 1)


def _size(wanted: StructuredOutputs) -> int:
    value = getattr(wanted, wanted.form)
    return sum(map(len, value)) if isinstance(value, tuple) else len(str(value))


def _refused(wanted: StructuredOutputs, why: str) -> RequestError:
    """What is wrong with a form, and for a schema what could be done."""
    hint = ""
    if wanted.form == "json" and wanted.strict and "no text" not in _reason(why):
        hint = "; with strict false the rest is enforced, and the finished JSON is checked"
    return RequestError(
        f"structured_outputs.{wanted.form} cannot be enforced: {_reason(why):.400}{hint}",
        f"structured_outputs.{wanted.form}",
    )


def _reason(why: str) -> str:
    """llguidance's words in ours, where its own name its insides."""
    if found := re.search(r"Unimplemented keys: \[(.*?)\]", why):
        return f"no grammar holds the keyword {found[1]}{why[found.end() :]}"
    if "oneOf constraints" in why:
        return 'no grammar holds the keyword "oneOf" unless its parts plainly exclude each other'
    if "min/maxProperties" in why:
        return 'no grammar holds the keyword "minProperties" or "maxProperties" beside properties that may be left out'
    if why.startswith("patternProperty"):
        return f'"patternProperties": {why}'
    if "regex parse error" in why and "(in regex)" not in why:
        return f'"pattern": {why}'
    if why.startswith("NoExtension"):
        return "no text fits it"
    if why.startswith("Unsatisfiable schema"):
        return f"no text fits it: {why}"
    return " ".join(why.split())
