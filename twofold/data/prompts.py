"""Rows that only ask: prompts by number, with the columns that rewards are given.

    {"prompt": "..." or [messages], ...}         TRL's prompt-only rows: every other key is a column
    {"data_source", "prompt", "reward_model": {"ground_truth"}, ...}     verl's: `ground_truth` becomes a column as well

`tools` go into the chat template. Where a source has answers, as python-docs does, they are the column "answer".
Prompts stay in memory, their ids in 4 bytes each: good for millions of them.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..core import ConfigError
from . import rows
from .dataset import Asked, Chat, Completion, Document, documents
from .examples import Counts, Limits, Parted
from .order import Order
from .wording import Wording


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """What a policy is to answer: ids as the model reads them, and the row of the data that they come from."""

    number: int
    """Its place among all rows of the run's sources; the seeds of its samples hang on it."""
    ids: tuple[int, ...]
    shown: str | list[dict[str, Any]] = ""
    """What the data said: a text, or a chat's messages."""
    columns: Mapping[str, Any] = field(default_factory=dict)
    """The row's other keys, for rewards."""


def asked(row: Mapping[str, Any]) -> Asked:
    """A row with 'prompt'; the other keys are its columns.

    Raises:
        ValueError: there is no prompt in it.
    """
    columns = {key: value for key, value in row.items() if key not in ("prompt", "tools")}
    truth = row.get("reward_model")
    if isinstance(truth, dict) and "ground_truth" in truth:
        columns.setdefault("ground_truth", truth["ground_truth"])
    return Asked(rows.said(row, "prompt"), columns, rows.tools(row))


def question(document: Document, source: str) -> Asked:
    """What a document asks; where it has the answer too (a completion, a chat's last message), that is a column.

    Raises:
        ConfigError: it asks nothing.
    """
    match document.content:
        case Asked() as content:
            return content
        case Completion(prompt, completion):
            return Asked(prompt, {"answer": completion})
        case Chat((*before, last), tools) if before and last.get("role") == "assistant":
            return Asked(tuple(before), {"answer": last["content"]}, tools)
    kind = type(document.content).__name__.lower()
    raise ConfigError(f"{document.where or source} holds {kind}: rows with 'prompt' are needed")


class Prompts(Sequence[Prompt]):
    """Tokenised prompts in the order of their source."""

    def __init__(self) -> None:
        self.counts = Counts()
        self._ids, self._starts = array("I"), [0]
        self._rows: list[tuple[int, str | list[dict[str, Any]], Mapping[str, Any]]] = []

    def add(self, number: int, ids: Sequence[int], content: Asked) -> None:
        """Take one more: row `number` of its source."""
        self._ids.extend(ids)
        self._starts.append(len(self._ids))
        self._rows.append((number, rows.plain(content.prompt), content.columns))

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, place: Any) -> Any:
        if isinstance(place, slice):
            return [self[at] for at in range(*place.indices(len(self)))]
        number, shown, columns = self._rows[place]
        place %= len(self)
        ids = self._ids[self._starts[place] : self._starts[place + 1]]
        return Prompt(number=number, ids=tuple(ids), shown=shown, columns=columns)

    def digest(self) -> bytes:
        """A hash of every prompt's ids and columns."""
        found = hashlib.sha256(self._ids.tobytes() + array("Q", self._starts).tobytes())
        found.update(json.dumps(self._rows, sort_keys=True, default=str).encode())
        return found.digest()


def read_prompts(
    sources: Sequence[str], wording: Wording, limits: Limits, *, valid_fraction: float = 0.0
) -> Parted[Prompts]:
    """Every source's prompts, tokenised: what is trained on, and what is held out (by the prompt, once).

    Raises:
        ConfigError: a source that cannot be read, a row that asks nothing, or messages without a chat template.
    """
    both = Prompts(), Prompts()
    seen: set[str] = set()
    number = 0
    for source in sources:
        for document in documents(source, asked):
            held_out = document.held_out(valid_fraction)
            if not (held_out and source in seen):
                _add(both[held_out], number, document, source, wording, limits)
            number += 1
        seen.add(source)
    train, valid = both
    return Parted(train, valid, hashlib.sha256(train.digest() + valid.digest()).hexdigest())


def _add(prompts: Prompts, number: int, document: Document, source: str, wording: Wording, limits: Limits) -> None:
    content = question(document, source)
    with document.named(source):
        ids = wording.prompt(content.prompt, content.tools)
    kept = limits.prompt(ids, prompts.counts)
    if kept is not None:
        prompts.add(number, kept, content)


class PromptLoader:
    """`batch(i)` is `size` prompts and a pure function of i; without `shuffle`, in the source's order.

    Raises:
        ConfigError: no prompts, or `size` is not positive.
    """

    def __init__(self, prompts: Sequence[Prompt], size: int, *, seed: int = 0, shuffle: bool = True) -> None:
        if size < 1:
            raise ConfigError(f"a batch must have 1 prompt or more, not {size}")
        self._prompts, self._size = prompts, size
        self._order = Order(len(prompts), seed=seed, shuffle=shuffle)

    def __len__(self) -> int:
        """Batches that one epoch takes, the last perhaps with prompts of the next."""
        return -(-len(self._prompts) // self._size)

    def batch(self, index: int) -> list[Prompt]:
        """Batch number `index`, from 0 on without end."""
        return self.take(index * self._size, (index + 1) * self._size)

    def take(self, first: int, last: int) -> list[Prompt]:
        """The prompts at positions first to last of the epochs end to end: for whoever draws more than a batch."""
        return [self._prompts[place] for place in self._order.take(first, last)]

    def once(self, limit: int | None = None) -> Iterator[list[Prompt]]:
        """The first epoch's batches, at most `limit`; each prompt once, so the last batch may be short."""
        for index in range(min(len(self), limit if limit is not None else len(self))):
            yield self.take(index * self._size, min((index + 1) * self._size, len(self._prompts)))
