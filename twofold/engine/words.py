"""Bad words as the token sequences that spell them: text becomes ids before a request goes to an engine."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .sampling import SamplingParams

if TYPE_CHECKING:
    from ..data import Tokenizer


def ban(params: SamplingParams, tokenizer: Tokenizer) -> SamplingParams:
    """The same with `bad_words` turned into `bad_words_ids`.

    A word is spelled in one way at the start of a text and in another after a space, and both are banned.
    """
    if not params.bad_words:
        return params
    spellings = [tuple(tokenizer.encode(before + word.lstrip())) for word in params.bad_words for before in ("", " ")]
    return params.with_(bad_words=(), bad_words_ids=tuple(dict.fromkeys((*params.bad_words_ids, *spellings))))
