"""Sources of documents: files, folders, globs, JSONL and named ones; and which documents are held out.

    "notes.txt"            one document                     "chats.jsonl"    one a line
    "corpus/", "*.md"      one a file, sorted by path       "python-stdlib"  a named source, see SOURCES

A line of JSONL to learn language from is {"text": ...}, {"messages": [...]} or {"prompt": ..., "completion": ...}, with
`tools` beside messages; other keys are left alone. What judges (preference.py) and what only asks (prompts.py) is read
by readers of their own.
"""

from __future__ import annotations

import glob
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..core import ConfigError, Registry, RequestError, nearest
from . import rows
from .rows import Message, Said

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
    """Messages as the API takes them: only the assistant's are learned, and of those only the ones behind `asked`."""

    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] = ()
    asked: int = 0
    """How many of the messages are the prompt."""


@dataclass(frozen=True, slots=True)
class Preference:
    """Two ways to go on from a prompt, the better one first; `margin` is by how much, where somebody said it."""

    prompt: Said
    chosen: Said
    rejected: Said
    margin: float = 0.0
    tools: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True, slots=True)
class Judged:
    """One way to go on from a prompt, and whether it was a good one."""

    prompt: Said
    completion: Said
    good: bool
    tools: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True, slots=True)
class Asked:
    """A prompt alone, and the row's other columns, which rewards are given."""

    prompt: Said
    columns: Mapping[str, Any]
    tools: tuple[Mapping[str, Any], ...] = ()


Content = Text | Completion | Chat | Preference | Judged | Asked
Reader = Callable[[Mapping[str, Any]], Content]
"""A row of JSONL to what it holds; raises ValueError for a bad one."""


@dataclass(frozen=True, slots=True)
class Document:
    """One thing to learn from. Documents of one `key` are held out together; `always_train` ones never are."""

    content: Content
    key: str | None = None
    always_train: bool = False
    where: str = field(default="", compare=False)
    """The file and line it stands in, for errors."""

    @contextmanager
    def named(self, source: str) -> Iterator[None]:
        """What is wrong with it while it is tokenised, as an error that says where it stands."""
        try:
            yield
        except RequestError as error:
            raise ConfigError(f"{self.where or source}: {error}") from None

    def canonical(self) -> bytes:
        """Its content as bytes, the same for equal content: what hashes are made of."""
        match self.content:
            case Text(text):
                plain: list[Any] = ["text", text]
            case Completion(prompt, completion):
                plain = ["completion", prompt, completion]
            case Chat(messages, tools, asked):
                more = [list(tools), asked] if tools or asked else []
                plain = ["chat", [dict(message) for message in messages], *more]
            case Preference(prompt, chosen, rejected, margin, tools):
                plain = ["preference", *map(rows.plain, (prompt, chosen, rejected)), margin, list(tools)]
            case Judged(prompt, completion, good, tools):
                plain = ["judged", rows.plain(prompt), rows.plain(completion), good, list(tools)]
            case Asked(prompt, columns, tools):
                plain = ["asked", rows.plain(prompt), dict(columns), list(tools)]
        return json.dumps(plain, sort_keys=True, ensure_ascii=True).encode()

    def held_out(self, fraction: float) -> bool:
        """Whether it is for validation: by a hash of its key or content, so the answer never depends on the others.

        What is judged or asked goes by its prompt, so that no prompt is on both sides.
        """
        if self.always_train:
            return False
        name = self.key.encode() if self.key is not None else self.canonical()
        if self.key is None and isinstance(self.content, Preference | Judged | Asked):
            name = json.dumps(["prompt", rows.plain(self.content.prompt)], sort_keys=True).encode()
        return int.from_bytes(hashlib.sha256(name).digest()[:8], "big") < fraction * 2**64


def language(row: Mapping[str, Any]) -> Text | Completion | Chat:
    """A row to learn language from: text, messages, or a prompt with its completion (both strings or both messages)."""
    kinds = [kind for kind in ("text", "messages", "completion") if kind in row]
    if len(kinds) != 1:
        hint = ": preferences are read by algorithm = 'reward' or 'dpo'" if "chosen" in row else ""
        raise ValueError(f"one of 'text', 'messages' or 'prompt' with 'completion' is needed, not {sorted(row)}{hint}")
    if kinds == ["messages"]:
        return Chat(rows.messages(row["messages"], "messages"), rows.tools(row))
    if kinds == ["text"]:
        if not isinstance(row["text"], str):
            raise ValueError("'text' must be a string")
        return Text(row["text"])
    prompt, completion = rows.said(row, "prompt"), rows.said(row, "completion")
    if isinstance(prompt, str) and isinstance(completion, str):
        return Completion(prompt, completion)
    if isinstance(prompt, str) or isinstance(completion, str):
        raise ValueError("'prompt' and 'completion' must be both strings or both lists of messages")
    return Chat((*prompt, *completion), rows.tools(row), len(prompt))


def documents(source: str, read: Reader = language) -> Iterator[Document]:
    """Every document of one source, in a fixed order; `read` says what a line of JSONL is.

    Raises:
        ConfigError: no such file or name, an empty match, a file that is not UTF-8, or a bad line, which is named.
    """
    if source in SOURCES:
        yield from SOURCES[source]()
        return
    for path in _files(source):
        if path.suffix == ".jsonl":
            yield from _lines(path, read)
        else:
            yield Document(Text(_read(path)), where=str(path))


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
    if path.suffix == ".parquet":
        raise ConfigError(f"{path} is Parquet, and Twofold reads JSONL: write it as one JSON object a line first")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 (byte {error.start}): convert it or leave it out") from None


def _lines(path: Path, read: Reader) -> Iterator[Document]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise ValueError(f"a line is a JSON object, not a {type(row).__name__}")
                content = read(row)
            except ValueError as error:  # a JSONDecodeError is one
                raise ConfigError(f"{path}, line {number}: {error}") from None
            yield Document(content, where=f"{path}, line {number}")
