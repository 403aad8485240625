"""Tokenizer: a checkpoint's own tokenizer, with special tokens that text cannot forge.

Two backends share one vocabulary: one reads "<|im_end|>" as the special token (prompts, templates), the other reads it
as ten ordinary characters (what a user wrote). They are two objects, because the switch between the two is state of the
backend and requests are tokenised on many threads. Calls go through `encode_batch`, which lets go of the interpreter
while it works: one 400 KB prompt through `encode` stops every other thread for 0.4 s.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import Encoding, processors
from tokenizers import Tokenizer as Backend

from ..core import CheckpointError, RequestError
from .speech.forms import PROMPT_MARKS
from .vocabulary import Spelling, is_byte_token, old_byte_level, read_json, spelled_bytes, spelling_of

_ROLES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
_END_OF_TEXT = ("<|endoftext|>", "<|end_of_text|>")


class Tokenizer:
    """Text to ids and back, for one model folder; safe to share between threads."""

    def __init__(
        self,
        source: str,
        *,
        settings: dict[str, Any],
        eos_ids: tuple[int, ...],
        bos_id: int | None,
        parsed: Backend | None = None,
    ) -> None:
        """`source` is the text of a tokenizer.json, `settings` the table of tokenizer_config.json; see `load`.

        `parsed` is a backend made of `source`, to take over: a large vocabulary takes a fifth of a second to parse.
        """
        self._source = source
        self._exact = _unbounded(parsed or Backend.from_str(source))
        self.settings = settings
        self.eos_ids = eos_ids
        self.bos_id = bos_id
        added = self._exact.get_added_tokens_decoder()
        self.special_ids = frozenset(place for place, token in added.items() if token.special)
        self.special_tokens = {token.content: place for place, token in added.items() if token.special}
        self._tokens = {place: token for token, place in self._exact.get_vocab(with_added_tokens=True).items()}
        self.vocab_size = max(self._tokens, default=-1) + 1
        self.spelling: Spelling = spelling_of(_decoder_table(self._exact))
        self._added = {place: token.content for place, token in added.items()}
        self.added_tokens = {token.content: place for place, token in added.items()}
        self.control_tokens = self.special_tokens | {
            text: place for text, place in self.added_tokens.items() if text in PROMPT_MARKS
        }
        _follow_settings(self._exact, settings, bos_id, eos_ids)

    @cached_property
    def _plain(self) -> Backend:
        """The backend of what users wrote, parsed at their first text: a prompt of `generate` never needs it."""
        backend = _unbounded(Backend.from_str(self._source))
        backend.encode_special_tokens = True
        _follow_settings(backend, self.settings, self.bos_id, self.eos_ids)
        return backend

    @classmethod
    def load(cls, folder: str | Path) -> Tokenizer:
        """Read a model folder's tokenizer: tokenizer.json, or GPT-2's vocab.json with merges.txt.

        End tokens are those of tokenizer_config.json and of generation_config.json (else config.json).

        Raises:
            CheckpointError: no tokenizer there that can be read, or a damaged one.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise CheckpointError(f"no model folder at {folder}: name a folder that holds tokenizer.json")
        settings = read_json(folder / "special_tokens_map.json") | read_json(folder / "tokenizer_config.json")
        source = _source(folder, settings)
        names = {role: _content(settings.get(role)) for role in _ROLES}
        try:
            backend = Backend.from_str(source)
        except Exception as error:  # the backend raises bare Exceptions
            raise CheckpointError(f"{folder / 'tokenizer.json'} cannot be read: {error}") from None
        config = read_json(folder / "config.json")
        ends = [backend.token_to_id(names["eos_token"])] if names["eos_token"] else []
        ends += end_ids(folder)
        bos = backend.token_to_id(names["bos_token"]) if names["bos_token"] else None
        if bos is None and "bos_token" not in settings:
            bos = next(iter(_ids(config.get("bos_token_id"))), None)
        eos_ids = tuple(dict.fromkeys(end for end in ends if end is not None))
        return cls(source, settings=settings, eos_ids=eos_ids, bos_id=bos, parsed=backend)

    @property
    def end_of_text(self) -> int | None:
        """The end token that closes a document (a chat model's other end tokens close a turn); None without one."""
        closing = [end for end in self.eos_ids if self._tokens.get(end) in _END_OF_TEXT]
        return next(iter([*closing, *self.eos_ids]), None)

    # ----------------------------------------------------------------------------------------- text to ids
    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Ids of `text` alone, nothing added; a special token spelled in it is plain text unless `special`."""
        return self.encode_spans(text, special=special)[0]

    def encode_prompt(self, text: str) -> list[int]:
        """Ids of a whole prompt as the checkpoint's own post-processor makes them: BOS where it wants one."""
        return list(_encode(self._exact, text, add=True).ids)

    def encode_text(
        self, text: str, second: str | None = None, *, most: int | None = None
    ) -> tuple[list[int], list[int]]:
        """Ids and token types of a text to be read whole, or of two read as one, with what the post-processor adds.

        A special token that a text spells is plain text. With `most` the longer text is cut until so many tokens are
        left, what is added included.

        Raises:
            RequestError: a lone surrogate, a vocabulary that cannot join two texts, or no room for what is added.
        """
        parts = [self._unforged(part) for part in (text, second) if part is not None]
        added = self._plain.num_special_tokens_to_add(len(parts) == 2)
        if most is not None:
            if most <= added:
                raise RequestError(f"{most} tokens hold no more than the {added} added to each text: allow more")
            for part, kept in zip(parts, _shares([len(part.ids) for part in parts], most - added), strict=True):
                part.truncate(kept)
        try:
            joined = self._plain.post_process(parts[0], parts[1] if len(parts) == 2 else None)
        except Exception as error:  # the backend raises bare Exceptions
            raise RequestError(f"this model's tokenizer cannot join two texts: {error}") from None
        return list(joined.ids), list(joined.type_ids)

    def _unforged(self, text: str) -> Encoding:
        """A text's own tokens; where the vocabulary's model itself reads a special token, its spelling is broken up."""
        encoding = _encode(self._plain, text)
        if self._forgeable.isdisjoint(encoding.ids):
            return encoding
        for start, _ in reversed(self.split_special(text)):
            text = f"{text[: start + 1]} {text[start + 1 :]}"
        return _encode(self._plain, text)

    def encode_spans(self, text: str, *, special: bool = False) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids, and for each the (start, end) of its characters in `text`.

        Raises:
            RequestError: the text holds a lone surrogate, which no UTF-8 can.
        """
        encoding = _encode(self._exact if special else self._plain, text)
        ids, spans = list(encoding.ids), list(encoding.offsets)
        if not special and not self._forgeable.isdisjoint(ids):
            return self._encode_broken(text, self.split_special(text), self._forgeable)
        return ids, spans

    def encode_foreign(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """As `encode_spans`, and the marks of calls and thoughts that are not called special are plain text too."""
        ids, spans = self.encode_spans(text)
        marks = self._forgeable.union(self.control_tokens.values()) - {self._unknown}
        return (ids, spans) if marks.isdisjoint(ids) else self._encode_broken(text, self.split_control(text), marks)

    def split_special(self, text: str) -> list[tuple[int, int]]:
        """Where special tokens are spelled in `text`: (start, end) of each, from left to right."""
        return [match.span() for match in self._special_pattern.finditer(text)] if self.special_tokens else []

    def split_control(self, text: str) -> list[tuple[int, int]]:
        """Where special tokens and marks of calls and thoughts are spelled in `text`."""
        return [match.span() for match in self._control_pattern.finditer(text)] if self.control_tokens else []

    def _encode_broken(
        self, text: str, spelled: Iterable[tuple[int, int]], forgeable: frozenset[int]
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """For vocabularies whose model itself holds the special tokens: cut each spelled one into characters."""
        cuts = [0, *(place for start, end in spelled for place in range(start + 1, end)), len(text)]
        ids: list[int] = []
        spans: list[tuple[int, int]] = []
        for start, end in itertools.pairwise(cuts):
            encoding = _encode(self._plain, text[start:end])
            for token, (left, right) in zip(encoding.ids, encoding.offsets):
                if token not in forgeable:
                    ids.append(token)
                    spans.append((start + left, start + right))
        return ids, spans

    @cached_property
    def _special_pattern(self) -> re.Pattern[str]:
        return _any_of(self.special_tokens)

    @cached_property
    def _control_pattern(self) -> re.Pattern[str]:
        return _any_of(self.control_tokens)

    @cached_property
    def special_edges(self) -> tuple[frozenset[str], frozenset[str]]:
        """What special tokens start with, and what they end with: all proper beginnings, all proper ends."""
        return _edges(self.special_tokens)

    @cached_property
    def control_edges(self) -> tuple[frozenset[str], frozenset[str]]:
        """As `special_edges`, of the marks of calls and thoughts as well."""
        return _edges(self.control_tokens)

    @cached_property
    def _unknown(self) -> int | None:
        return self._exact.token_to_id(_content(self.settings.get("unk_token")) or "<unk>")

    @cached_property
    def _forgeable(self) -> frozenset[int]:
        """Special ids but the unknown token, which stands for a character the vocabulary lacks."""
        return self.special_ids - {self._unknown}

    # ----------------------------------------------------------------------------------------- ids to text
    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of `ids`; broken UTF-8 reads as U+FFFD, ids beyond the vocabulary as nothing."""
        known = [token for token in ids if token in self._tokens]
        return str(self._exact.decode(known, skip_special_tokens=skip_special_tokens))

    def token_bytes(self, token: int) -> bytes:
        """The bytes that one id stands for, b"" for an id beyond the vocabulary."""
        if token in self._added:
            return self._added[token].encode("utf-8")
        return spelled_bytes(self._tokens[token], self.spelling) if token in self._tokens else b""

    def token(self, token: int) -> str | None:
        """How the vocabulary itself spells an id, None beyond it."""
        return self._tokens.get(token)

    def id_of(self, token: str) -> int | None:
        """The id of a token by its spelling in the vocabulary."""
        return self._exact.token_to_id(token)

    def stream_bytes(self, token: int) -> bytes | None:
        """What a byte-level decoder adds to the byte stream for this id; None when the spelling is not byte level."""
        if self.spelling != "bytes":
            return None
        return spelled_bytes(self._tokens[token], "bytes") if token in self._tokens else b""

    def is_open(self, token: int) -> bool:
        """Whether text that ends with this id may still change: a raw byte of a SentencePiece vocabulary."""
        return self.spelling == "fallback" and is_byte_token(self._tokens.get(token, ""))

    def serialized(self) -> str:
        """The text of tokenizer.json: what a cache of its output is keyed by."""
        return str(self._plain.to_str())


def _any_of(names: Iterable[str]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))))


def _edges(names: Iterable[str]) -> tuple[frozenset[str], frozenset[str]]:
    cuts = [(name, cut) for name in names for cut in range(1, len(name))]
    return frozenset(name[:cut] for name, cut in cuts), frozenset(name[cut:] for name, cut in cuts)


def _unbounded(backend: Backend) -> Backend:
    backend.no_truncation()
    backend.no_padding()
    return backend


def _encode(backend: Backend, text: str, *, add: bool = False) -> Encoding:
    try:
        return backend.encode_batch([text], add_special_tokens=add)[0]
    except TypeError:
        raise RequestError("the text holds a lone surrogate, which UTF-8 cannot carry: remove it") from None


def _decoder_table(backend: Backend) -> Any:
    return json.loads(backend.decoder.__getstate__()) if backend.decoder is not None else None


def _follow_settings(backend: Backend, settings: dict[str, Any], bos_id: int | None, eos_ids: tuple[int, ...]) -> None:
    """`add_bos_token` and `add_eos_token` of tokenizer_config.json win over the post-processor in tokenizer.json."""
    if "add_bos_token" not in settings and "add_eos_token" not in settings:
        return
    bos, eos = _content(settings.get("bos_token")), _content(settings.get("eos_token"))
    before = [(bos, bos_id)] if settings.get("add_bos_token") and bos and bos_id is not None else []
    after = [(eos, eos_ids[0])] if settings.get("add_eos_token") and eos and eos_ids else []
    first, last = [name for name, _ in before], [name for name, _ in after]
    backend.post_processor = processors.TemplateProcessing(
        single=[*first, "$A", *last],
        pair=[*first, "$A", *last, *(f"{name}:1" for name in first), "$B:1", *(f"{name}:1" for name in last)],
        special_tokens=[*before, *after],
    )


def _shares(lengths: Sequence[int], room: int) -> list[int]:
    """How much of each of one or two texts is kept when the longer is cut until both fit."""
    if sum(lengths) <= room:
        return list(lengths)
    if len(lengths) == 1:
        return [room]
    a, b = lengths
    half = room // 2
    kept = min(a, max(room - half, room - b))
    return [kept, room - kept]


def end_ids(folder: str | Path) -> tuple[int, ...]:
    """The end tokens that a model folder's generation_config.json (else config.json) names, without its tokenizer."""
    config, generation = (read_json(Path(folder) / f"{name}.json") for name in ("config", "generation_config"))
    return tuple(_ids(generation.get("eos_token_id", config.get("eos_token_id"))))


def _source(folder: Path, settings: dict[str, Any]) -> str:
    path = folder / "tokenizer.json"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        names = [name for role in _ROLES if (name := _content(settings.get(role)))]
        return str(old_byte_level(folder, list(dict.fromkeys(names or ["<|endoftext|>"]))).to_str())
    pieces = sorted(path.name for path in folder.glob("*.model"))
    if pieces:
        raise CheckpointError(
            f"{folder} has only a SentencePiece vocabulary ({pieces[0]}) and Twofold reads tokenizer.json: "
            "save the tokenizer once with transformers (AutoTokenizer.from_pretrained(...).save_pretrained(...))"
        )
    raise CheckpointError(f"{folder} has no tokenizer.json, nor vocab.json with merges.txt: copy it there")


def _content(token: Any) -> str | None:
    """A special token as tokenizer_config.json writes it: a string, or a table with its content."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) and token else None


def _ids(value: Any) -> Iterable[int]:
    values = value if isinstance(value, list) else [value]
    return [item for item in values if isinstance(item, int) and not isinstance(item, bool)]
