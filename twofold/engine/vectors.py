"""What may be asked of a text besides its continuation, and what comes: numbers as bytes that cross a process.

embed           one vector of a text           token_embed      one of each token
classify        a number for each label        token_classify   those of each token
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from typing import Literal

import msgspec

from ..core import RequestError

Task = Literal["embed", "classify", "token_embed", "token_classify"]
Similarity = Literal["cosine", "dot"]
NO_POOLING = (
    "this model generates text: start it with --runner pooling for embeddings alone, or --convert embed for both"
)
NO_TEXT = "this model makes vectors or scores and no text: ask for /v1/embeddings, /score, /rerank or /classify"


class Pooling(msgspec.Struct, frozen=True, kw_only=True):
    """One task. `dimensions` cuts a vector to its first numbers (matryoshka: Kusupati et al. 2022).

    `normalize` None is as the checkpoint has it; tokens' own vectors are left as they are. `activate` False leaves out
    the softmax or sigmoid behind a score head.
    """

    task: Task
    dimensions: int | None = None
    normalize: bool | None = None
    activate: bool = True


class Pooled(msgspec.Struct, frozen=True):
    """Numbers of some shape, fp32, little endian, the last dimension together."""

    shape: tuple[int, ...]
    data: bytes

    def numbers(self) -> list[float]:
        """All of them, flat."""
        return array("f", self.data).tolist()

    def rows(self) -> list[list[float]]:
        """The same by row: of a vector the one."""
        flat, width = self.numbers(), self.shape[-1]
        return [flat[at : at + width] for at in range(0, len(flat), width)]


class Abilities(msgspec.Struct, frozen=True, kw_only=True):
    """What an engine does. `width` is the numbers of an embedding, `labels` the names of a score head's, `types` how
    many token types there are.

    `prompt` stands before each text that is embedded; `paired` says that one score judges two texts read as one.
    """

    generates: bool = True
    tasks: tuple[Task, ...] = ()
    width: int = 0
    types: int = 1
    labels: tuple[str, ...] = ()
    paired: bool = False
    prompt: str = ""
    similarity: Similarity = "cosine"

    def check(self, asked: Pooling) -> None:
        """Raises RequestError when this model does not do what is asked."""
        if not self.tasks:
            raise RequestError(NO_POOLING)
        if asked.task not in self.tasks:
            raise RequestError(f"this model does {', '.join(self.tasks)}, not {asked.task}", "task")
        if asked.dimensions is not None and (asked.task != "embed" or not 1 <= asked.dimensions <= self.width):
            raise RequestError(
                f"dimensions is {asked.dimensions}; an embedding of this model has 1 to {self.width}", "dimensions"
            )

    def check_scores(self) -> None:
        """Raises RequestError when texts cannot be compared: neither by a score head of one label nor by vectors."""
        if not self.tasks:
            raise RequestError(NO_POOLING)
        if not (self.paired or "embed" in self.tasks):
            raise RequestError(
                "texts are compared by a score head of one label, or by embeddings; this model has "
                f"{len(self.labels)} labels: ask /classify or /pooling"
            )


def paired(first: str | Sequence[str], second: str | Sequence[str]) -> list[tuple[str, str]]:
    """Pairs of two lists of one length, or of one text and each of the others.

    Raises:
        RequestError: nothing to compare, or lists of different lengths.
    """
    a, b = ([text] if isinstance(text, str) else list(text) for text in (first, second))
    if not a or not b:
        raise RequestError("two texts are compared: send at least one on each side", "text_2" if a else "text_1")
    if len(a) == 1:
        a *= len(b)
    if len(a) != len(b):
        raise RequestError(f"{len(a)} texts and {len(b)}: send one, or as many on both sides", "text_1")
    return list(zip(a, b, strict=True))


def similarity(a: Sequence[float], b: Sequence[float], kind: str) -> float:
    """How alike two vectors are: the cosine of their angle, or their product."""
    product = sum(x * y for x, y in zip(a, b, strict=True))
    if kind == "dot":
        return product
    length = math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))
    return product / length if length else 0.0


def task_of(tasks: Sequence[Task]) -> Task:
    """What a model with these tasks is asked when nobody says: its labels, or each token's vector.

    Raises:
        RequestError: it has none.
    """
    if not tasks:
        raise RequestError(NO_POOLING)
    return next(task for task in ("classify", "token_classify", "token_embed") if task in tasks)
