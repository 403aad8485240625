"""Sources of documents: files, folders, globs, JSONL and named ones; and which documents are held out.

    "notes.txt"            one document                     "chats.jsonl"    one a line
    "corpus/", "*.md"      one a file, sorted by path       "python-stdlib"  a named source, see SOURCES

A line of JSONL is {"text": ...}, {"messages": [...]} or {"prompt": ..., "completion": ...}; other keys are left alone.
"""

from __future__ import annotations

import glob
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..core import ConfigError, Registry, nearest

SOURCES: Registry[Callable[[], Iterator[Document]]] = Registry("source")
"""Named sources: a function without arguments that yields the same documents in the same order every time."""

TEXT_SUFFIXES = (".jsonl", ".md", ".py", ".rst", ".txt")
"""What a folder is searched for; a glob takes every file that it matches."""


@dataclass(frozen=True, slots=True)
class Text:
    """Running text: every token is learned."""

    text: str


@dataclass(frozen=True, slots=True)
class Completion:
    """A prompt and how it goes on: only the completion is learned."""

    prompt: str
    completion: str


@dataclass(frozen=True, slots=True)
class Chat:
    """Messages as the API takes them: only the assistant's are learned."""

    messages: tuple[Mapping[str, Any], ...]


@dataclass(frozen=True, slots=True)
class Document:
    """One thing to learn from. Documents of one `key` are held out together; `always_train` ones never are."""

    content: Text | Completion | Chat
    key: str | None = None
    always_train: bool = False

    def canonical(self) -> bytes:
        """Its content as bytes, the same for equal content: what hashes are made of."""
        match self.content:
            case Text(text):
                plain: list[Any] = ["text", text]
            case Completion(prompt, completion):
                plain = ["completion", prompt, completion]
            case Chat(messages):
                plain = ["chat", [dict(message) for message in messages]]
        return json.dumps(plain, sort_keys=True, ensure_ascii=True).encode()

    def held_out(self, fraction: float) -> bool:
        """Whether it is for validation: by a hash of its key or content, so the answer never depends on the others."""
        if self.always_train:
            return False
        name = self.key.encode() if self.key is not None else self.canonical()
        return int.from_bytes(hashlib.sha256(name).digest()[:8], "big") < fraction * 2**64


def documents(source: str) -> Iterator[Document]:
    """Every document of one source, in a fixed order.

    Raises:
        ConfigError: no such file or name, an empty match, a file that is not UTF-8, or a bad line, which is named.
    """
    if source in SOURCES:
        yield from SOURCES[source]()
        return
    for path in _files(source):
        if path.suffix == ".jsonl":
            yield from _lines(path)
        else:
            yield Document(Text(_read(path)))


def _files(source: str) -> list[Path]:
    path = Path(source).expanduser()
    if path.is_file():
        return [path]
    if path.is_dir():
        found = [file for file in path.rglob("*") if file.suffix in TEXT_SUFFIXES and file.is_file()]
        wanted = f"files ending in {', '.join(TEXT_SUFFIXES)}"
    else:
        found = [file for name in glob.glob(str(path), recursive=True) if (file := Path(name)).is_file()]
        wanted = "files"
    if found:
        return sorted(found)
    guess = nearest(source, SOURCES)
    hint = f"; did you mean '{guess}'?" if guess else f"; named sources are: {', '.join(SOURCES)}"
    raise ConfigError(f"source '{source}' names no {wanted}{hint}")


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 (byte {error.start}): convert it or leave it out") from None


def _lines(path: Path) -> Iterator[Document]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    yield Document(_content(json.loads(line)))
                except (json.JSONDecodeError, ValueError) as error:
                    raise ConfigError(f"{path}, line {number}: {error}") from None


def _content(row: Any) -> Text | Completion | Chat:
    if not isinstance(row, dict):
        raise ValueError(f"a line is a JSON object, not a {type(row).__name__}")
    kinds = [kind for kind in ("text", "messages", "completion") if kind in row]
    if len(kinds) != 1:
        raise ValueError(f"one of 'text', 'messages' or 'prompt' with 'completion' is needed, not {sorted(row)}")
    if kinds == ["text"] and isinstance(row["text"], str):
        return Text(row["text"])
    if kinds == ["completion"] and isinstance(row["completion"], str) and isinstance(row.get("prompt"), str):
        return Completion(row["prompt"], row["completion"])
    messages = row.get("messages")
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"'{kinds[0]}' must be {'a list of messages' if kinds == ['messages'] else 'a string'}")
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str) or "content" not in message:
            raise ValueError(f"a message is an object with 'role' and 'content', not {message!s:.80}")
    return Chat(tuple(messages))
