"""What the tokens of a vocabulary stand for, and how a vocabulary without tokenizer.json is read.

Three ways in which vocabularies spell bytes:

    byte level     every byte is one printable character: "Ġlen" is b" len"         GPT-2 and most since
    byte fallback  "▁" is a space, "<0x0A>" is the byte 0x0A, the rest is UTF-8     SentencePiece
    plain          the token is its UTF-8                                            word level
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, Literal

from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from ..core import CheckpointError

Spelling = Literal["bytes", "fallback", "plain"]

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@cache
def byte_alphabet() -> Mapping[str, int]:
    """GPT-2's printable character for each byte, as character to byte (Radford et al. 2019)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(byte): byte for byte in printable}
    others = [byte for byte in range(256) if byte not in printable]
    table.update({chr(256 + place): byte for place, byte in enumerate(others)})
    return table


def spelling_of(decoder: Any) -> Spelling:
    """How a tokenizer.json's `decoder` table spells bytes."""
    kinds = _kinds(decoder)
    if kinds == ["ByteLevel"]:
        return "bytes"
    return "fallback" if {"ByteFallback", "Metaspace", "Replace"} & set(kinds) else "plain"


def _kinds(decoder: Any) -> list[str]:
    if not isinstance(decoder, dict):
        return []
    if decoder.get("type") == "Sequence":
        return [kind for part in decoder.get("decoders", []) for kind in _kinds(part)]
    return [str(decoder.get("type"))]


def spelled_bytes(token: str, spelling: Spelling) -> bytes:
    """The bytes that a token's spelling stands for; a byte-level token with a foreign character is its own UTF-8."""
    if spelling == "bytes":
        table = byte_alphabet()
        return bytes(table[c] for c in token) if all(c in table for c in token) else token.encode("utf-8")
    if spelling == "fallback":
        byte = _BYTE.fullmatch(token)
        return bytes([int(byte[1], 16)]) if byte else token.replace("▁", " ").encode("utf-8")
    return token.encode("utf-8")


def is_byte_token(token: str) -> bool:
    """Whether a SentencePiece token is one raw byte."""
    return _BYTE.fullmatch(token) is not None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a model folder, or {} when the file is not there.

    Raises:
        CheckpointError: the file is there and is not a JSON object.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} must hold a JSON object, not a {type(found).__name__}")
    return found


def old_byte_level(folder: Path, special: list[str]) -> Backend:
    """GPT-2's tokenizer from `vocab.json` and `merges.txt`, with `special` and `added_tokens.json` added."""
    vocab = {str(token): int(place) for token, place in read_json(folder / "vocab.json").items()}
    lines = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()
    pairs = [line.split(" ") for line in lines if line and not line.startswith("#version")]
    if any(len(pair) != 2 for pair in pairs):
        raise CheckpointError(f"{folder / 'merges.txt'}: every line holds two pieces with one space between")
    backend = Backend(models.BPE(vocab=vocab, merges=[(a, b) for a, b in pairs]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    added = sorted(read_json(folder / "added_tokens.json").items(), key=lambda item: int(item[1]))
    backend.add_tokens([AddedToken(name, special=False, normalized=False) for name, _ in added])
    backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in special])
    return backend
