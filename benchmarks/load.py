"""A client of any server that speaks OpenAI's API: sends requests when they are due, and notes when each piece comes.

One connection a request, one task a request, one thread: what it costs itself is told beside the figures (`lag`, how
late a request was sent).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import ssl
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import httptools
from traffic import Ask

LIMIT = 1 << 16


@dataclass(frozen=True, kw_only=True)
class Target:
    """Where requests go. `chat` asks /v1/chat/completions, else /v1/completions; `extra` is added to every body."""

    url: str
    model: str
    chat: bool = False
    key: str | None = None
    ignore_eos: bool = True
    temperature: float = 0.0
    extra: dict[str, Any] = field(default_factory=dict)

    def body(self, ask: Ask) -> dict[str, Any]:
        asked: dict[str, Any] = {
            "model": self.model,
            "max_tokens": ask.tokens_out,
            "temperature": self.temperature,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        asked |= {"messages": [{"role": "user", "content": ask.prompt}]} if self.chat else {"prompt": ask.prompt}
        if self.ignore_eos:  # vLLM's field: OpenAI's own server knows no such thing
            asked["ignore_eos"] = True
        return asked | self.extra


@dataclass(kw_only=True)
class Seen:
    """What became of one request; times are seconds on one clock, `pieces` those of each piece of text."""

    due: float
    sent: float = 0.0
    ended: float = 0.0
    pieces: list[float] = field(default_factory=list)
    tokens_in: int = 0
    tokens_out: int = 0
    error: str | None = None


class _Reader:
    """httptools' callbacks: the status, and each server-sent event as it is complete."""

    def __init__(self, seen: Seen) -> None:
        self.seen = seen
        self.parser = httptools.HttpResponseParser(self)
        self.done = False
        self._rest = b""
        self._failed = b""

    def on_body(self, body: bytes) -> None:
        if self.parser.get_status_code() != 200:
            self._failed += body
            return
        *events, self._rest = (self._rest + body).replace(b"\r\n", b"\n").split(b"\n\n")
        for event in events:
            if event.startswith(b"data:"):
                self._event(event[5:].strip())

    def on_message_complete(self) -> None:
        self.done = True
        status = self.parser.get_status_code()
        if status != 200:
            self.seen.error = f"HTTP {status}: {self._failed[:200].decode('utf-8', 'replace')}"

    def _event(self, data: bytes) -> None:
        if data == b"[DONE]":
            return
        said = json.loads(data)
        if said.get("error"):
            self.seen.error = str(said["error"])[:200]
        for choice in said.get("choices") or ():
            delta = choice.get("delta") or {}
            if choice.get("text") or delta.get("content") or delta.get("reasoning_content"):
                self.seen.pieces.append(time.perf_counter())
        if usage := said.get("usage"):
            self.seen.tokens_in, self.seen.tokens_out = usage["prompt_tokens"], usage["completion_tokens"]


async def one(target: Target, ask: Ask, due: float) -> Seen:
    """Send one request and read its answer to the end; what goes wrong is in `error`."""
    seen = Seen(due=due, sent=time.perf_counter())
    parts = urlsplit(target.url)
    secure = ssl.create_default_context() if parts.scheme == "https" else None
    body = json.dumps(target.body(ask)).encode()
    path = parts.path.rstrip("/") + ("/chat/completions" if target.chat else "/completions")
    head = f"POST {path} HTTP/1.1\r\nHost: {parts.netloc}\r\nContent-Type: application/json\r\n"
    head += f"Authorization: Bearer {target.key}\r\n" if target.key else ""
    head += f"Connection: close\r\nContent-Length: {len(body)}\r\n\r\n"
    try:
        reader, writer = await asyncio.open_connection(
            parts.hostname, parts.port or (443 if secure else 80), ssl=secure, limit=LIMIT
        )
        try:
            writer.write(head.encode() + body)
            parsed = _Reader(seen)
            while not parsed.done and (data := await reader.read(LIMIT)):
                parsed.parser.feed_data(data)
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()
    except (OSError, ValueError, KeyError, httptools.HttpParserError) as error:
        seen.error = f"{type(error).__name__}: {error}"
    seen.ended = time.perf_counter()
    if seen.error is None and not seen.tokens_out:
        seen.tokens_out = len(seen.pieces)  # a server that tells no usage: a piece is taken for a token
    if seen.error is None and not seen.pieces:
        seen.error = "no text came"
    return seen


async def open_loop(target: Target, asks: Sequence[Ask], most: int | None = None) -> list[Seen]:
    """Every request at its time, whether or not earlier ones are answered; at most `most` at once when given."""
    start = time.perf_counter() + 0.05
    seats = asyncio.Semaphore(most) if most else contextlib.nullcontext()

    async def later(ask: Ask) -> Seen:
        due = start + ask.at
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        async with seats:
            return await one(target, ask, due)

    return list(await asyncio.gather(*(later(ask) for ask in asks)))


async def closed_loop(target: Target, asks: Sequence[Ask], clients: int) -> list[Seen]:
    """`clients` that each send the next request as soon as their last one is answered."""
    left = iter(asks)
    seen: list[Seen] = []

    async def client() -> None:
        for ask in left:
            seen.append(await one(target, ask, time.perf_counter()))

    await asyncio.gather(*(client() for _ in range(clients)))
    return seen
