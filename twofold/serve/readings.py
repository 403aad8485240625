"""The routes of texts that are read and not continued.

/v1/embeddings                       a vector of each text
/score /v1/score                     how well two texts go together
/rerank /v1/rerank /v2/rerank        documents by how well they go with a query
/classify /v1/classify               labels of each text
/pooling                             whatever the model's head gives, of a text or of each token
"""

from __future__ import annotations

import time
from base64 import b64encode
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from ..core import RequestError
from ..engine.vectors import Abilities, Pooled, Pooling, paired, similarity, task_of
from . import reads
from .answers import json
from .bodies import decode
from .reading import Reading
from .reads import check_count, inputs

if TYPE_CHECKING:
    from .app import Api


class Readings:
    """Vectors, scores and labels."""

    def __init__(self, api: Api) -> None:
        self.api = api

    def routes(self) -> list[BaseRoute]:
        post = ["POST"]
        found = {
            "/v1/embeddings": self.embeddings,
            "/score": self.score,
            "/v1/score": self.score,
            "/rerank": self.rerank,
            "/v1/rerank": self.rerank,
            "/v2/rerank": self.rerank,
            "/classify": self.classify,
            "/v1/classify": self.classify,
            "/pooling": self.pooling,
        }
        return [Route(path, answer, methods=post) for path, answer in found.items()]

    async def embeddings(self, request: Request) -> Response:
        body = decode(reads.EmbeddingRequest, await request.body())
        asked = Pooling(task="embed", dimensions=body.dimensions, normalize=body.normalize)
        found, usage = await self._read(request, body, self._inputs(body, asked), asked)

        def answer() -> Response:
            data = [
                reads.Embedding(index, _text(pooled) if body.encoding_format == "base64" else pooled.numbers())
                for index, pooled in enumerate(found)
            ]
            return json(reads.Embeddings(**self._head("embd", request, body), data=data, usage=usage))

        return await self._off_loop(found, answer)

    async def pooling(self, request: Request) -> Response:
        body = decode(reads.PoolingRequest, await request.body())
        can = self._able()
        asked = Pooling(
            task=body.task or task_of(can.tasks),
            dimensions=body.dimensions,
            normalize=body.normalize,
            activate=body.use_activation is not False,
        )
        found, usage = await self._read(request, body, self._inputs(body, asked), asked)

        def answer() -> Response:
            data = [
                reads.PoolingData(index, _text(pooled) if body.encoding_format == "base64" else _shaped(pooled))
                for index, pooled in enumerate(found)
            ]
            return json(reads.Poolings(**self._head("pool", request, body), data=data, usage=usage))

        return await self._off_loop(found, answer)

    async def classify(self, request: Request) -> Response:
        body = decode(reads.ClassifyRequest, await request.body())
        asked = Pooling(task="classify", activate=body.use_activation is not False)
        found, usage = await self._read(request, body, self._inputs(body, asked), asked)
        data = []
        for index, pooled in enumerate(found):
            numbers, labels = pooled.numbers(), self._able().labels
            best = labels[max(range(len(numbers)), key=numbers.__getitem__)]
            data.append(reads.Classified(index, best, numbers, len(numbers)))
        return json(reads.Classification(**self._head("classify", request, body), data=data, usage=usage))

    async def score(self, request: Request) -> Response:
        body = decode(reads.ScoreRequest, await request.body())
        for name, given in (("text_1", body.text_1), ("text_2", body.text_2)):
            check_count(1 if isinstance(given, str) else len(given), self.api.config.limits.texts, name)
        pairs = paired(body.text_1, body.text_2)
        scores, usage = await self._compared(request, body, pairs, activate=body.use_activation is not False)
        data = [reads.Score(index, score) for index, score in enumerate(scores)]
        return json(reads.Scores(**self._head("score", request, body), data=data, usage=usage))

    async def rerank(self, request: Request) -> Response:
        body = decode(reads.RerankRequest, await request.body())
        texts, top = body.texts(), body.top()
        check_count(len(texts), self.api.config.limits.texts, "documents")
        scores, usage = await self._compared(request, body, [(body.query, text) for text in texts])
        cohere = request.url.path == "/v2/rerank"
        told = not cohere if body.return_documents is None else body.return_documents
        order = sorted(range(len(scores)), key=lambda index: -scores[index])[:top]
        results = [
            reads.Ranked(index, scores[index], reads.Document(texts[index]) if told else None) for index in order
        ]
        head = self._head("rerank", request, body)
        meta: dict[str, dict[str, str | int]] = {
            "api_version": {"version": "2" if cohere else "1"},
            "billed_units": {"search_units": 1},
        }
        return json(reads.Rerank(head["id"], head["model"], results, usage, meta))

    # -- what they share --------------------------------------------------------------------------------------------

    async def _compared(
        self, request: Request, body: reads.Common, pairs: Sequence[tuple[str, str]], activate: bool = True
    ) -> tuple[list[float], reads.Usage]:
        """A score of each pair: both read as one by a score head, or the likeness of their vectors."""
        can = self._able()
        can.check_scores()
        if can.paired:
            found, usage = await self._read(request, body, list(pairs), Pooling(task="classify", activate=activate))
            return [pooled.numbers()[0] for pooled in found], usage
        texts = list(dict.fromkeys(text for pair in pairs for text in pair))
        found, usage = await self._read(request, body, self._prompted(texts), Pooling(task="embed"))
        vectors = dict(zip(texts, (pooled.numbers() for pooled in found), strict=True))
        size = len(pairs) * can.width
        return await self.api.texts.off_loop(
            size, lambda: [similarity(vectors[a], vectors[b], can.similarity) for a, b in pairs]
        ), usage

    async def _read(
        self,
        request: Request,
        body: reads.Common,
        texts: Sequence[str | list[int] | tuple[str, str]],
        asked: Pooling,
    ) -> tuple[list[Pooled], reads.Usage]:
        body.check()
        if self.api.check_model(body.model):
            raise RequestError("texts are not read with adapters: ask the model itself", "model")
        self._able().check(asked)
        if any(not part for text in texts if isinstance(text, tuple) for part in text):
            raise RequestError("a text is empty: send at least one character", "text_2")
        self.api.check_room(request, len(texts))
        cut = body.truncate_prompt_tokens
        most = self.api.limits.max_model_len if cut == -1 else cut
        special = getattr(body, "add_special_tokens", None) is not False
        ids = await self.api.texts.read(texts, most=most, special=special)
        deadline = self.api.deadline(request)
        reading = Reading(self.api, ids, asked, priority=body.priority or 0, deadline=deadline)
        found = await reading.run(request)
        return found, reads.Usage(reading.tokens, reading.tokens)

    def _inputs(self, body: Any, asked: Pooling) -> list[str | list[int]]:
        texts = inputs(body.input, self.api.config.limits.texts)
        return self._prompted(texts) if asked.task == "embed" else texts

    def _prompted(self, texts: Sequence[str | list[int]]) -> list[str | list[int]]:
        """Texts behind what the checkpoint puts before each; ids are as they are."""
        prompt = self._able().prompt
        return [prompt + text if isinstance(text, str) else text for text in texts]

    def _able(self) -> Abilities:
        return self.api.abilities

    def _head(self, prefix: str, request: Request, body: reads.Common) -> dict[str, Any]:
        name = f"{prefix}-{body.request_id or request.scope['request_id']}"
        return {"id": name, "created": int(time.time()), "model": self.api.config.name}

    async def _off_loop(self, found: Sequence[Pooled], work: Any) -> Response:
        """Many numbers become text in a thread."""
        response: Response = await self.api.texts.off_loop(sum(len(pooled.data) for pooled in found) // 4, work)
        return response


def _text(pooled: Pooled) -> str:
    return b64encode(pooled.data).decode()


def _shaped(pooled: Pooled) -> list[float | list[float]]:
    return [*pooled.rows()] if len(pooled.shape) == 2 else [*pooled.numbers()]
