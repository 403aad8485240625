"""Prompts with completions as ids: where the completion begins, what of it is learned, and what was too long.

    messages (or text where `chat` is set)     through the chat template, each answer up to its end of turn
    text                                       what the tokenizer puts before a prompt │ prompt │ completion, end of text

The prompt's ids are those that a rollout begins with, and no token reaches over the border. Examples stay in memory, at
5 bytes a token: good for some hundreds of millions of tokens.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar

import numpy as np
import numpy.typing as npt

from ..core import ConfigError
from .corpus import Corpus
from .dataset import Document
from .preference import judgements, preferences
from .rows import Message, Said
from .tokenizer import Tokenizer

if TYPE_CHECKING:
    from .chat import ChatTemplate

T = TypeVar("T")


@dataclass(frozen=True)
class Parted(Generic[T]):
    """What is trained on, what is held out, and the hash of both."""

    train: T
    valid: T
    fingerprint: str


@dataclass
class Counts:
    """What became of the rows: how many lost something to `Limits`, and how many were left out."""

    rows: int = 0
    cut_prompts: int = 0
    cut_completions: int = 0
    dropped: int = 0

    def __str__(self) -> str:
        return (
            f"{self.rows} rows, {self.dropped} dropped, {self.cut_prompts} prompts cut, "
            f"{self.cut_completions} completions cut"
        )


@dataclass(frozen=True)
class Example:
    """Ids of a prompt, ids of one completion, and which of the completion's are learned."""

    prompt: list[int]
    completion: list[int]
    learn: list[bool]


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How long prompts and completions may be, in tokens, and what becomes of longer ones."""

    seq_len: int = 1024
    """Prompt and completion together."""
    max_prompt: int | None = None
    max_completion: int | None = None
    too_long: Literal["cut", "drop"] = "cut"
    """cut: a prompt keeps its end and a completion its beginning, as TRL's DPO has it; drop: the row is left out, as
    TRL's reward trainer has it. Where a prompt leaves no room for a completion, the row is left out anyway."""

    def __post_init__(self) -> None:
        for name in ("seq_len", "max_prompt", "max_completion"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be 1 or more, not {value}")

    def prompt(self, ids: list[int], counts: Counts) -> list[int] | None:
        """A prompt alone within limits, None when it is dropped."""
        counts.rows += 1
        long = self.max_prompt is not None and len(ids) > self.max_prompt
        if not ids or (long and self.too_long == "drop") or (not long and len(ids) > self.seq_len):
            counts.dropped += 1
            return None
        counts.cut_prompts += long
        return ids[-self.max_prompt :] if long and self.max_prompt else ids

    def all(self, examples: Sequence[Example], counts: Counts) -> list[Example]:
        """The examples of one row within limits; none of them when one must be dropped."""
        counts.rows += 1
        kept = [self._one(example) for example in examples]
        changed = [
            (len(b.prompt) < len(a.prompt), len(b.completion) < len(a.completion)) for a, b in zip(examples, kept)
        ]
        useless = any(not any([*example.learn][not example.prompt :]) for example in kept)
        if useless or (self.too_long == "drop" and any(map(any, changed))):
            counts.dropped += 1
            return []
        counts.cut_prompts += any(prompt for prompt, _ in changed)
        counts.cut_completions += any(completion for _, completion in changed)
        return kept

    def _one(self, example: Example) -> Example:
        most = self.max_prompt if self.max_prompt is not None else len(example.prompt)
        prompt = example.prompt[max(0, len(example.prompt) - most) :]
        room = max(0, self.seq_len - len(prompt))
        room = min(room, self.max_completion) if self.max_completion is not None else room
        return Example(prompt, example.completion[:room], example.learn[:room])


class Wording:
    """How rows become ids: a tokenizer, its chat template for messages, and whether text is what a user says.

    Raises:
        ConfigError: `chat` without a template.
    """

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate | None = None, *, chat: bool = False) -> None:
        if chat and template is None:
            raise _no_template()
        self._tokenizer, self._template, self._chat = tokenizer, template, chat
        bos = tokenizer.bos_id
        self._start = [bos] if bos is not None and tokenizer.encode_prompt("")[:1] == [bos] else []
        self._end = [tokenizer.end_of_text] if tokenizer.end_of_text is not None else []

    def prompt(self, asked: Said, tools: Sequence[Mapping[str, Any]] = ()) -> list[int]:
        """What a rollout begins with. Messages that end with the assistant's leave that one open to go on with.

        Raises:
            ConfigError: messages without a template.
            RequestError: the template refuses them.
        """
        if isinstance(asked, str) and not self._chat:
            return [*self._start, *self._tokenizer.encode(asked)]
        messages = _spoken(asked, "user")
        if self._template is None:
            raise _no_template()
        going_on = messages[-1]["role"] in ("assistant", "model")
        return self._template.encode(
            self._tokenizer,
            messages,
            tools=list(tools) or None,
            add_generation_prompt=not going_on,
            continue_final_message=going_on,
        )

    def example(self, asked: Said, completion: Said, tools: Sequence[Mapping[str, Any]] = ()) -> Example:
        """A prompt and a completion. Of messages, every one of the assistant's in the completion is learned.

        Raises:
            ConfigError: messages without a template.
            RequestError: the template refuses them.
        """
        if isinstance(asked, str) and isinstance(completion, str) and not self._chat:
            answer = [*self._tokenizer.encode(completion), *self._end]
            return Example(self.prompt(asked), answer, [True] * len(answer))
        if self._template is None:
            raise _no_template()
        question, answers = _spoken(asked, "user"), _spoken(completion, "assistant")
        return Example(*self._template.encode_answer(self._tokenizer, question, answers, tools=list(tools) or None))


def _spoken(said: Said, role: str) -> tuple[Message, ...]:
    return ({"role": role, "content": said},) if isinstance(said, str) else said


def _no_template() -> ConfigError:
    return ConfigError(
        "messages need a chat template: the tokenizer's folder has none, put a chat_template.jinja there"
    )


@dataclass(frozen=True, kw_only=True)
class Examples:
    """Examples end to end: document d of `corpus` is a prompt and, from `answers[d]` on, its completion.

    Of preferences, documents 2k and 2k + 1 are the chosen and the rejected one of pair k. `values` [documents] float32:
    the pair's margin, or 1 for a good completion and 0 for a bad one.
    """

    corpus: Corpus
    answers: npt.NDArray[np.int64]
    values: npt.NDArray[np.float32]
    limits: Limits
    counts: Counts

    def __len__(self) -> int:
        return len(self.corpus)

    def digest(self) -> bytes:
        """A hash of every id, mask and value."""
        corpus = self.corpus
        parts = (corpus.ids, corpus.learn, corpus.starts, self.answers, self.values)
        return hashlib.sha256(b"".join(hashlib.sha256(part.tobytes()).digest() for part in parts)).digest()


def read_preferences(
    sources: Sequence[str], wording: Wording, limits: Limits, *, valid_fraction: float = 0.0
) -> Parted[Examples]:
    """Preferences as pairs of examples, chosen first; a row is kept or dropped with both of its completions.

    Raises:
        ConfigError: a source that cannot be read, a row that is no preference, or messages without a chat template.
    """

    def rows(source: str) -> Iterator[tuple[Document, list[Example], float]]:
        for document, row in preferences(source):
            with document.named(source):
                pair = [wording.example(row.prompt, end, row.tools) for end in (row.chosen, row.rejected)]
            yield document, pair, row.margin

    return _read(sources, rows, limits, valid_fraction)


def read_judged(
    sources: Sequence[str], wording: Wording, limits: Limits, *, valid_fraction: float = 0.0
) -> Parted[Examples]:
    """Judged completions as examples; preferences among the rows are taken apart, the chosen one good.

    Raises:
        ConfigError: a source that cannot be read, a row without judgement, or messages without a chat template.
    """

    def rows(source: str) -> Iterator[tuple[Document, list[Example], float]]:
        for document, row in judgements(source):
            with document.named(source):
                example = wording.example(row.prompt, row.completion, row.tools)
            yield document, [example], float(row.good)

    return _read(sources, rows, limits, valid_fraction)


def _read(sources: Sequence[str], rows: Any, limits: Limits, valid_fraction: float) -> Parted[Examples]:
    """Both sides of every source; one that is named twice is learned twice and validated once."""
    both = _Writer(limits), _Writer(limits)
    for place, source in enumerate(sources):
        for document, examples, value in rows(source):
            held_out = document.held_out(valid_fraction)
            if not (held_out and source in sources[:place]):
                both[held_out].add(examples, value)
    train, valid = (writer.done() for writer in both)
    return Parted(train, valid, hashlib.sha256(train.digest() + valid.digest()).hexdigest())


class _Writer:
    def __init__(self, limits: Limits) -> None:
        self._limits, self._counts = limits, Counts()
        self._ids, self._learn, self._values = array("I"), bytearray(), array("f")
        self._starts, self._answers = array("q", [0]), array("q")

    def add(self, examples: Sequence[Example], value: float) -> None:
        for example in self._limits.all(examples, self._counts):
            self._ids.extend(example.prompt + example.completion)
            self._learn += bytes(len(example.prompt)) + bytes(example.learn)
            self._answers.append(self._starts[-1] + len(example.prompt))
            self._starts.append(len(self._ids))
            self._values.append(value)

    def done(self) -> Examples:
        corpus = Corpus(
            np.array(self._ids, dtype=np.uint32),
            np.frombuffer(bytes(self._learn), dtype=np.uint8),
            np.array(self._starts, dtype=np.int64),
        )
        return Examples(
            corpus=corpus,
            answers=np.array(self._answers, dtype=np.int64),
            values=np.array(self._values, dtype=np.float32),
            limits=self._limits,
            counts=self._counts,
        )
