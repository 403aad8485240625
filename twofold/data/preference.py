"""Rows that judge: which of two completions is better, or whether one is good, in the columns that TRL gives them.

    {"prompt", "chosen", "rejected"}     strings, or lists of messages         Preference; "margin": 1.5 is taken along
    {"chosen", "rejected"}               the prompt is what both begin with    Preference
    {"prompt", "completion", "label"}    label true or false                   Judged

"tools" beside them go into the chat template. A preference read as judged rows is two: its chosen is good.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ..core import ConfigError
from . import rows
from .dataset import Document, Judged, Preference, documents
from .rows import Message, Said


def preference(row: Mapping[str, Any]) -> Preference:
    """A row with 'chosen' and 'rejected'; without 'prompt', the prompt is their common beginning.

    Raises:
        ValueError: a column is missing, of the wrong kind, or both completions are the same.
    """
    chosen, rejected = rows.said(row, "chosen"), rows.said(row, "rejected")
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise ValueError("'chosen' and 'rejected' must be both strings or both lists of messages")
    if chosen == rejected:
        raise ValueError("'chosen' and 'rejected' are the same")
    prompt: Said | None = rows.said(row, "prompt") if row.get("prompt") is not None else None
    if isinstance(prompt, str) and not isinstance(chosen, str) and not isinstance(rejected, str):
        prompt = _as_messages(prompt, chosen, rejected)
    if prompt is None:
        prompt, chosen, rejected = _common(chosen, rejected)
    if isinstance(prompt, str) != isinstance(chosen, str):
        raise ValueError("a 'prompt' of messages needs 'chosen' and 'rejected' as lists of messages")
    margin = row.get("margin") or 0.0
    if not isinstance(margin, int | float):
        raise ValueError(f"'margin' must be a number, not {margin!r}")
    return Preference(prompt, chosen, rejected, float(margin), rows.tools(row))


def judged(row: Mapping[str, Any]) -> Judged | Preference:
    """A row with 'prompt', 'completion' and 'label'; a preference row is let through, for `judgements` to take apart.

    Raises:
        ValueError: a column is missing or of the wrong kind.
    """
    if "chosen" in row and "rejected" in row:
        return preference(row)
    prompt, completion, label = rows.said(row, "prompt"), rows.said(row, "completion"), row.get("label")
    if isinstance(prompt, str) != isinstance(completion, str):
        raise ValueError("'prompt' and 'completion' must be both strings or both lists of messages")
    if not isinstance(label, bool):
        raise ValueError(f"'label' must be true or false, not {label!r}")
    return Judged(prompt, completion, label, rows.tools(row))


def preferences(source: str) -> Iterator[tuple[Document, Preference]]:
    """Every preference of one source.

    Raises:
        ConfigError: as `documents`, or the source holds something else.
    """
    for document in documents(source, preference):
        if not isinstance(document.content, Preference):
            raise _other(document, source, "'chosen' and 'rejected'")
        yield document, document.content


def judgements(source: str) -> Iterator[tuple[Document, Judged]]:
    """Every judged completion of one source; a preference is two of them.

    Raises:
        ConfigError: as `documents`, or the source holds something else.
    """
    for document in documents(source, judged):
        match document.content:
            case Judged() as one:
                yield document, one
            case Preference(prompt, chosen, rejected, _, tools):
                yield document, Judged(prompt, chosen, True, tools)
                yield document, Judged(prompt, rejected, False, tools)
            case _:
                raise _other(document, source, "'prompt', 'completion' and 'label'")


def _other(document: Document, source: str, wanted: str) -> ConfigError:
    kind = type(document.content).__name__.lower()
    return ConfigError(f"{document.where or source} holds {kind}: rows with {wanted} are needed")


def _as_messages(prompt: str, chosen: tuple[Message, ...], rejected: tuple[Message, ...]) -> Said | None:
    """A prompt given as text beside completions given as messages: None where those repeat it, as some data sets do."""
    if chosen[0] == rejected[0] and chosen[0]["role"] == "user" and chosen[0]["content"] == prompt:
        return None
    return ({"role": "user", "content": prompt},)


def _common(chosen: Said, rejected: Said) -> tuple[Said, Said, Said]:
    """What both begin with, and the two ends. Text is cut before a space, which belongs to the word behind it."""
    same = [a == b for a, b in zip(chosen, rejected)]
    size = same.index(False) if False in same else len(same)
    if isinstance(chosen, str):
        size -= size > 0 and chosen[size - 1] == " "
    elif not 0 < size < min(len(chosen), len(rejected)):
        raise ValueError("'chosen' and 'rejected' need a prompt in common and an answer each: give 'prompt'")
    return chosen[:size], chosen[size:], rejected[size:]
