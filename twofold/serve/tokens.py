"""The routes between text and ids."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from ..core import RequestError
from .answers import json
from .bodies import decode
from .messages import Message, plain
from .tools import Tool, asked

if TYPE_CHECKING:
    from .app import Api


class TokenizeRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """POST /tokenize: a prompt, or messages."""

    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: list[Tool] | None = None


class DetokenizeRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """POST /detokenize."""

    model: str | None = None
    tokens: list[int]


class Tokens:
    """What the tokenizer and the chat template make of a text, and back."""

    def __init__(self, api: Api) -> None:
        self.api = api

    def routes(self) -> list[BaseRoute]:
        return [
            Route("/tokenize", self.tokenize, methods=["POST"]),
            Route("/detokenize", self.detokenize, methods=["POST"]),
        ]

    async def tokenize(self, request: Request) -> Response:
        body = decode(TokenizeRequest, await request.body())
        self.api.check_model(body.model)
        if (body.prompt is None) == (body.messages is None):
            raise RequestError("send prompt or messages, and not both", "prompt")
        if body.prompt is not None:
            (ids,) = await self.api.texts.prompts([body.prompt], special=body.add_special_tokens is not False)
        else:
            messages = plain(body.messages or [], self.api.config.limits.messages)
            ids = await self.api.texts.chat(
                messages,
                add_generation_prompt=body.add_generation_prompt,
                continue_final_message=body.continue_final_message,
                settings=body.chat_template_kwargs,
                tools=asked(body.tools, None, None),
            )
        strings = [self.api.texts.tokenizer.token(i) for i in ids] if body.return_token_strs else None
        return json({"count": len(ids), "max_model_len": self.api.limits.max_model_len, "tokens": ids,
                     "token_strs": strings})  # fmt: skip

    async def detokenize(self, request: Request) -> Response:
        body = decode(DetokenizeRequest, await request.body())
        self.api.check_model(body.model)
        wrong = [i for i in body.tokens if not 0 <= i < self.api.limits.vocab]
        if wrong:
            raise RequestError(f"token id {wrong[0]} is outside the vocabulary of {self.api.limits.vocab}", "tokens")
        text = await self.api.texts.off_loop(
            4 * len(body.tokens), lambda: self.api.texts.tokenizer.decode(body.tokens, skip_special_tokens=False)
        )
        return json({"prompt": text})
