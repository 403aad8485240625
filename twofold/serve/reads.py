"""Requests about texts that are read and not continued, and their answers: OpenAI's, Jina's, Cohere's, vLLM's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import msgspec

from ..core import RequestError
from ..engine.vectors import Task
from .openai import MAX_TEXT

Input = str | list[str | int | list[int]]


class Common(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """What all of them share. `truncate_prompt_tokens` cuts each text to so many tokens, -1: to the context."""

    model: str | None = None
    truncate_prompt_tokens: int | None = None
    priority: int | None = None
    request_id: str | None = None
    user: str | None = None

    def check(self) -> None:
        """What no single field can say; raises RequestError."""
        cut = self.truncate_prompt_tokens
        if cut is not None and cut != -1 and not 1 <= cut < 2**31:
            raise RequestError(f"truncate_prompt_tokens must be -1 or at least 1, not {cut}", "truncate_prompt_tokens")
        if self.priority is not None and not -(2**31) <= self.priority < 2**31:
            raise RequestError(f"priority must be in [-2^31, 2^31), not {self.priority}", "priority")
        name = self.request_id
        if name is not None and not (0 < len(name) <= MAX_TEXT and name.isprintable()):
            raise RequestError(f"request_id must be 1 to {MAX_TEXT} printable characters", "request_id")


class EmbeddingRequest(Common, kw_only=True, forbid_unknown_fields=True):
    """POST /v1/embeddings. `dimensions` keeps the first numbers of each vector, and makes its length 1 again."""

    input: Input
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = None
    normalize: bool | None = None
    add_special_tokens: bool | None = None


class PoolingRequest(Common, kw_only=True, forbid_unknown_fields=True):
    """POST /pooling: what `task` says, raw where nothing else is asked for."""

    input: Input
    task: Task | None = None
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = None
    normalize: bool | None = None
    use_activation: bool | None = None
    add_special_tokens: bool | None = None


class ClassifyRequest(Common, kw_only=True, forbid_unknown_fields=True):
    """POST /classify. `use_activation` false leaves the scores as they are."""

    input: Input
    use_activation: bool | None = None
    add_special_tokens: bool | None = None


class ScoreRequest(Common, kw_only=True, forbid_unknown_fields=True):
    """POST /score: one text beside each of several, or two lists side by side."""

    text_1: str | list[str]
    text_2: str | list[str]
    use_activation: bool | None = None


class Document(msgspec.Struct, forbid_unknown_fields=True):
    text: str


class RerankRequest(Common, kw_only=True, forbid_unknown_fields=True):
    """POST /rerank. `return_documents` None is as the route has it."""

    query: str
    documents: list[str | Document]
    top_n: int | None = None
    return_documents: bool | None = None

    def texts(self) -> list[str]:
        return [document if isinstance(document, str) else document.text for document in self.documents]

    def top(self) -> int:
        """How many results are wanted; raises RequestError for none."""
        if self.top_n is not None and self.top_n < 0:
            raise RequestError(f"top_n must be 0 (all) or more, not {self.top_n}", "top_n")
        return self.top_n or len(self.documents)


def inputs(given: Input, most: int) -> list[str | list[int]]:
    """One string or one list of ids for each text.

    Raises:
        RequestError: none, too many, an empty one, or a mixture.
    """
    if isinstance(given, str):
        found: list[str | list[int]] = [given]
    elif given and all(isinstance(item, int) for item in given):
        found = [given]  # type: ignore[list-item]
    elif all(isinstance(item, str) for item in given) or all(isinstance(item, list) for item in given):
        found = given  # type: ignore[assignment]
    else:
        raise RequestError("input is a text, a list of texts, token ids, or a list of lists of token ids", "input")
    check_count(len(found), most, "input")
    if any(not text for text in found):
        raise RequestError("a text of the input is empty: send at least one character or token", "input")
    return found


def check_count(count: int, most: int, name: str) -> None:
    """Raises RequestError for no texts, or too many."""
    if not 1 <= count <= most:
        raise RequestError(f"{name} holds {count} texts; 1 to {most} are read at once: split it", name)


# ---------------------------------------------------------------------------------------------------------- answers
class Usage(msgspec.Struct):
    prompt_tokens: int
    total_tokens: int
    completion_tokens: int = 0


class Embedding(msgspec.Struct):
    index: int
    embedding: list[float] | str
    object: str = "embedding"


class Embeddings(msgspec.Struct):
    id: str
    created: int
    model: str
    data: list[Embedding]
    usage: Usage
    object: str = "list"


class PoolingData(msgspec.Struct):
    index: int
    data: Sequence[float | Sequence[float]] | str
    object: str = "pooling"


class Poolings(msgspec.Struct):
    id: str
    created: int
    model: str
    data: list[PoolingData]
    usage: Usage
    object: str = "list"


class Classified(msgspec.Struct):
    index: int
    label: str
    probs: list[float]
    num_classes: int


class Classification(msgspec.Struct):
    id: str
    created: int
    model: str
    data: list[Classified]
    usage: Usage
    object: str = "list"


class Score(msgspec.Struct):
    index: int
    score: float
    object: str = "score"


class Scores(msgspec.Struct):
    id: str
    created: int
    model: str
    data: list[Score]
    usage: Usage
    object: str = "list"


class Ranked(msgspec.Struct, omit_defaults=True):
    index: int
    relevance_score: float
    document: Document | None = None


class Rerank(msgspec.Struct):
    id: str
    model: str
    results: list[Ranked]
    usage: Usage
    meta: dict[str, dict[str, str | int]]
