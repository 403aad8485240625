"""A checkpoint's tokenizer as llguidance wants it: the bytes of every id, the ids that end a text, the special ones."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from llguidance import LLTokenizer, TokenizerWrapper

from ...data import Tokenizer

LONGEST = 64  # bytes of a token that a text is cut into


class Vocabulary:
    """`size` ids, as many as the model has logits; ids that the tokenizer lacks are never allowed.

    A model without an end token gets a stand-in that is never allowed either: its texts end where a grammar does.

    Raises:
        CheckpointError: the folder has no tokenizer that can be read.
    """

    def __init__(self, folder: str | Path, size: int, eos_ids: Sequence[int]) -> None:
        tokenizer = Tokenizer.load(folder)
        self.size = size
        count = max(size, tokenizer.vocab_size)
        self.eos_ids = tuple(end for end in eos_ids if end < tokenizer.vocab_size)
        ends = list(self.eos_ids) or [_stand_in(tokenizer)]
        self.never = () if self.eos_ids else (ends[0],)
        self._special = {text: token for text, token in tokenizer.control_tokens.items() if token < size}
        try:
            self.tokens = LLTokenizer(tokenizer.serialized(), n_vocab=count, eos_token=ends)
        except ValueError:  # a way to spell bytes that llguidance does not read from tokenizer.json
            self.tokens = LLTokenizer(TokenizerWrapper(_Pieces(tokenizer, ends[0])), n_vocab=count, eos_token=ends)

    def special(self, text: str) -> int | None:
        """The id of the special token that `text` spells, if it does."""
        return self._special.get(text)

    def mask(self, bits: bytes) -> bytes:
        """One bit for each id the model has, in words of 32, from llguidance's own mask."""
        size = -(-self.size // 32) * 4
        out = bytearray(bits[:size].ljust(size, b"\0"))
        for token in (*self.never, *range(self.size, 8 * size)):
            if token < 8 * size:
                out[token >> 3] &= ~(1 << (token & 7)) & 255
        return bytes(out)


def _stand_in(tokenizer: Tokenizer) -> int:
    """An id that no text needs: a special one, else the last."""
    return min(tokenizer.special_ids, default=tokenizer.vocab_size - 1)


class _Pieces:
    """What TokenizerWrapper asks for, from each id's bytes alone; a text is cut into the longest tokens there are."""

    def __init__(self, tokenizer: Tokenizer, eos_id: int) -> None:
        self.eos_token_id = eos_id
        self.bos_token_id = None
        self.special_token_ids = sorted(tokenizer.special_ids)
        self.tokens = [tokenizer.token_bytes(token) for token in range(tokenizer.vocab_size)]
        plain = [token for token in range(len(self.tokens)) if token not in tokenizer.special_ids]
        self._ids = {self.tokens[token]: token for token in reversed(plain)}
        self._cut = lru_cache(4096)(self._cut_once)

    def __call__(self, text: bytes | str) -> list[int]:
        return list(self._cut(text.encode("utf-8") if isinstance(text, str) else bytes(text)))

    def _cut_once(self, text: bytes) -> tuple[int, ...]:
        found, at = [], 0
        while at < len(text):
            for size in range(min(LONGEST, len(text) - at), 0, -1):
                token = self._ids.get(text[at : at + size])
                if token is not None:
                    found.append(token)
                    break
            else:
                break  # what is left has no tokens: llguidance takes what came so far
            at += size
        return tuple(found)
