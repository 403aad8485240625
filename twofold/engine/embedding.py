"""TextJudge: what an LLM says of texts rather than after them: vectors, labels, scores."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..core import RequestError
from .engine import Engine
from .pooling import PoolingEngine
from .request import Request
from .sampling import SamplingParams
from .vectors import Pooled, Pooling, paired, similarity

if TYPE_CHECKING:
    from ..data import Tokenizer

Text = str | Sequence[int]
Read = tuple[Sequence[int], Sequence[int]]
"""A text's ids, and their types where there is more than one."""


class TextJudge:
    """The part of `LLM` that makes no text; it has an engine and a tokenizer."""

    engine: Engine | PoolingEngine
    tokenizer: Tokenizer
    _names: itertools.count[int]

    def embed(self, texts: Text | Sequence[Text], *, dimensions: int | None = None) -> list[list[float]]:
        """A vector of each text, normalised as the checkpoint has it; the first `dimensions` of it when asked for.

        Raises:
            RequestError: this model makes no embeddings, or a text that it cannot read.
        """
        prompt = self.engine.abilities.prompt
        many = [prompt + text if isinstance(text, str) else text for text in _listed(texts)]
        found = self._pooled([self._read(text) for text in many], Pooling(task="embed", dimensions=dimensions))
        return [pooled.numbers() for pooled in found]

    def classify(self, texts: Text | Sequence[Text], *, activate: bool = True) -> list[dict[str, float]]:
        """What the score head says of each text, by label; raw with `activate` False.

        Raises:
            RequestError: this model has no labels, or a text that it cannot read.
        """
        asked = Pooling(task="classify", activate=activate)
        found = self._pooled([self._read(text) for text in _listed(texts)], asked)
        return [dict(zip(self.engine.abilities.labels, pooled.numbers(), strict=True)) for pooled in found]

    def score(self, first: str | Sequence[str], second: str | Sequence[str]) -> list[float]:
        """How well texts go together, pair by pair; one text stands beside all of the others.

        A model with a score head of one label reads both as one; of another the vectors are compared.

        Raises:
            RequestError: lists of different lengths, or a model that does neither.
        """
        pairs = paired(first, second)
        can = self.engine.abilities
        can.check_scores()
        if can.paired:
            read = [self.tokenizer.encode_text(a, b) for a, b in pairs]
            return [pooled.numbers()[0] for pooled in self._pooled(read, Pooling(task="classify"))]
        texts = list(dict.fromkeys(text for pair in pairs for text in pair))
        vectors = dict(zip(texts, self.embed(texts), strict=True))
        return [similarity(vectors[a], vectors[b], can.similarity) for a, b in pairs]

    def _read(self, text: Text) -> Read:
        return self.tokenizer.encode_text(text) if isinstance(text, str) else (text, ())

    def _pooled(self, texts: Sequence[Read], asked: Pooling) -> list[Pooled]:
        """One answer for each text, in order; nothing is left in the engine when one of them cannot be read."""
        names = [f"llm-{next(self._names)}" for _ in texts]
        found: dict[str, Pooled] = {}
        kinds = self.engine.abilities.types
        try:
            for name, (ids, types) in zip(names, texts, strict=True):
                kept = tuple(types) if kinds > 1 else ()
                request = Request(
                    id=name, prompt_ids=tuple(ids), params=SamplingParams(), pooling=asked, types=kept, seed=0
                )
                self.engine.submit(request)
            while len(found) < len(names):
                for output in self.engine.step():
                    if output.error is not None:
                        raise RequestError(output.error)
                    if output.pooled is not None:
                        found[output.request_id] = output.pooled
        finally:
            for name in names:
                self.engine.abort(name)
        return [found[name] for name in names]


def _listed(texts: Text | Sequence[Text]) -> list[Text]:
    if isinstance(texts, str) or (texts and isinstance(texts[0], int)):
        return [texts]  # type: ignore[list-item]
    return list(texts)  # type: ignore[arg-type]
