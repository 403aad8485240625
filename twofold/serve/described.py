"""What each route takes and answers, beside what all of them share: the rows that the OpenAPI document is made from."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import msgspec

from . import adapters, answers, generate, history, ledger, openai, reads, record, reload, tokens
from .anthropic import shapes as anthropic
from .batches import shapes as batches
from .pages import KINDS
from .responses import shapes as responses

JSON, EVENTS = "application/json", "text/event-stream"

Schema = dict[str, Any]

NUMBER: Schema = {"type": "integer", "minimum": 0}
TEXT: Schema = {"type": "string"}
PAGE: dict[str, Schema] = {
    "limit": {"type": "integer", "minimum": 1, "maximum": 10_000}, "order": {"enum": ["asc", "desc"]}, "after": TEXT
}  # fmt: skip


class Models(msgspec.Struct):
    """What /v1/models lists; other fields may stand beside these."""

    data: list[dict[str, Any]]
    object: str = "list"


@dataclass(frozen=True)
class Row:
    """One route. `answer` None is a JSON object of no fixed fields; `kinds` replaces JSON when it is no JSON at all;
    `form` is the schema of a body that is a form.

    `more` holds the statuses that this route has beside those of its method (openapi.py).
    """

    summary: str
    body: type | None = None
    answer: type | None = None
    kinds: tuple[str, ...] = ()
    query: dict[str, Schema] = field(default_factory=dict)
    form: Schema | None = None
    streams: bool = False
    more: tuple[int, ...] = ()


GENERATION = (404, 429, 500, 503, 504)

ROWS: dict[tuple[str, str], Row] = {
    ("POST", "/v1/completions"): Row(
        "Continue prompts.", openai.CompletionRequest, answers.Text, streams=True, more=GENERATION
    ),
    ("POST", "/v1/chat/completions"): Row(
        "Answer a chat.", openai.ChatRequest, answers.Chat, streams=True, more=GENERATION
    ),
    ("POST", "/v1/responses"): Row(
        "Answer a chat, and keep the answer.", responses.ResponseRequest, responses.Response, streams=True,
        more=GENERATION,
    ),
    ("GET", "/v1/responses/{name}"): Row(
        "A kept answer, or its events again.", answer=responses.Response, streams=True, more=(404,),
        query={"stream": {"type": "boolean"}, "starting_after": NUMBER},
    ),
    ("DELETE", "/v1/responses/{name}"): Row("Forget an answer.", answer=responses.ResponseDeleted, more=(404,)),
    ("POST", "/v1/responses/{name}/cancel"): Row("Stop one in the background.", answer=responses.Response, more=(404,)),
    ("GET", "/v1/responses/{name}/input_items"): Row(
        "What a kept answer was asked.", answer=responses.ItemList, more=(404,),
        query={
            "limit": {"type": "integer", "minimum": 1, "maximum": 100}, "order": {"enum": ["asc", "desc"]},
            "after": TEXT,
        },
    ),
    ("POST", "/v1/messages"): Row(
        "Answer a chat, in Anthropic's shape.", anthropic.MessagesRequest, anthropic.Answer, streams=True,
        more=GENERATION,
    ),
    ("POST", "/v1/messages/count_tokens"): Row(
        "How many tokens a chat has.", anthropic.CountRequest, anthropic.Count, more=(404, 503)
    ),
    ("POST", "/inference/v1/generate"): Row(
        "Continue token ids.", generate.GenerateRequest, generate.GenerateAnswer, streams=True, more=GENERATION
    ),
    ("POST", "/v1/files"): Row(
        "Upload a file for a batch.", answer=batches.FileObject, more=(429,),
        form={
            "type": "object", "required": ["purpose", "file"], "additionalProperties": False,
            "properties": {"purpose": {"const": "batch"}, "file": {"type": "string", "format": "binary"}},
        },
    ),
    ("GET", "/v1/files"): Row("Files, newest first.", answer=batches.FileList, query={**PAGE, "purpose": TEXT}),
    ("GET", "/v1/files/{name}"): Row("One file.", answer=batches.FileObject, more=(404,)),
    ("DELETE", "/v1/files/{name}"): Row("Delete a file.", answer=batches.FileDeleted, more=(404, 409)),
    ("GET", "/v1/files/{name}/content"): Row("A file's bytes.", kinds=("application/octet-stream",), more=(404,)),
    ("POST", "/v1/batches"): Row(
        "Answer a file of requests when there is time.", batches.BatchRequest, batches.BatchObject, more=(429,)
    ),
    ("GET", "/v1/batches"): Row("Batches, newest first.", answer=batches.BatchList, query=PAGE),
    ("GET", "/v1/batches/{name}"): Row("One batch.", answer=batches.BatchObject, more=(404,)),
    ("POST", "/v1/batches/{name}/cancel"): Row("End a batch.", answer=batches.BatchObject, more=(404,)),
    ("POST", "/v1/embeddings"): Row(
        "A vector of each text.", reads.EmbeddingRequest, reads.Embeddings, more=GENERATION
    ),
    ("POST", "/pooling"): Row(
        "What the model's head gives, of a text or of each token.", reads.PoolingRequest, reads.Poolings,
        more=GENERATION,
    ),
    **{
        ("POST", path): Row("Labels of each text.", reads.ClassifyRequest, reads.Classification, more=GENERATION)
        for path in ("/classify", "/v1/classify")
    },
    **{
        ("POST", path): Row("How well texts go together.", reads.ScoreRequest, reads.Scores, more=GENERATION)
        for path in ("/score", "/v1/score")
    },
    **{
        ("POST", path): Row("Documents by a query.", reads.RerankRequest, reads.Rerank, more=GENERATION)
        for path in ("/rerank", "/v1/rerank", "/v2/rerank")
    },
    ("POST", "/tokenize"): Row("A text's token ids.", tokens.TokenizeRequest, more=(404, 503)),
    ("POST", "/detokenize"): Row("The text of token ids.", tokens.DetokenizeRequest, more=(404, 503)),
    ("POST", "/v1/load_lora_adapter"): Row(
        "Load an adapter.", adapters.LoadRequest, kinds=("text/plain",), more=(404, 429)
    ),
    ("POST", "/v1/unload_lora_adapter"): Row(
        "Forget an adapter.", adapters.UnloadRequest, kinds=("text/plain",), more=(404, 429)
    ),
    ("POST", "/reload"): Row("Read keys and limits again.", answer=reload.Reloaded),
    ("GET", "/v1/models"): Row("What is served.", answer=Models),
    ("GET", "/v1/models/{name}"): Row("One model.", more=(404,)),
    ("GET", "/health"): Row("Whether a request sent now would be worked on.", more=(503,)),
    ("GET", "/livez"): Row("Whether the server lives.", more=(503,)),
    ("GET", "/readyz"): Row("Whether a request sent now would be worked on.", more=(503,)),
    ("GET", "/version"): Row("Twofold's version."),
    ("GET", "/metrics"): Row("What Prometheus reads.", kinds=("text/plain",)),
    ("GET", "/stats"): Row("What the page's live view shows."),
    ("GET", "/history"): Row(
        "What the server did in the last half hour, a row every few seconds.", answer=history.HistoryRows,
        query={"from": NUMBER, "model": TEXT},
    ),
    ("GET", "/requests"): Row(
        "Requests under way and ended, newest first.", answer=ledger.RequestList,
        query={"limit": {"type": "integer", "minimum": 1, "maximum": 100_000}, "state": {"enum": [*ledger.STATES]}},
    ),
    ("GET", "/requests/{name}"): Row("What became of a request.", answer=record.RequestFacts, more=(404,)),
    ("GET", "/runs"): Row("The runs of training that are found."),
    ("GET", "/runs/{name}"): Row(
        "A run's rows.", more=(404,), query={"from": NUMBER, "row": NUMBER, "version": TEXT}
    ),
    ("GET", "/openapi.json"): Row("This document."),
    ("GET", "/"): Row("The chat page.", kinds=("text/html",)),
    ("GET", "/overview"): Row("The overview page.", kinds=("text/html",)),
    ("GET", "/train"): Row("The training page.", kinds=("text/html",)),
    ("GET", "/favicon.ico"): Row("The pages' icon.", kinds=("image/svg+xml",)),
    ("GET", "/ui/{name}"): Row("The pages' files.", kinds=tuple(KINDS.values()), more=(404,)),
}  # fmt: skip
