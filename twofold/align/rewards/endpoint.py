"""An HTTP endpoint as a reward: one POST a batch, attempts with pauses between, and an answer of bounded size and time.

    json       {"prompts", "completions", "completion_ids", "columns", "step"}  ->  [0.5, null] or {"rewards": [...]}
    openrlhf   {"query", "prompts", "labels"}                                   ->  {"rewards": [...], "extra_logs": {}}

Redirects are not followed and proxies are not asked: what is posted goes to the address in the recipe alone.
"""

from __future__ import annotations

import http.client
import os
import socket
import time
from typing import Any
from urllib.parse import urlsplit

import msgspec

from ...core import ConfigError
from .config import RewardConfig
from .extract import text_of
from .function import labels_of, openrlhf_answer
from .wire import Batch, Broken, Scored

LARGEST = 8 * 1024 * 1024
"""Bytes of an answer."""
_FIRST_PAUSE = 0.1


class _Again(Exception):
    """An attempt that may go better next time."""


class Endpoint:
    """Posts batches to one address."""

    def __init__(self, config: RewardConfig) -> None:
        self._config = config
        self._url = urlsplit(config.url)
        self._headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if config.token:
            secret = os.environ.get(config.token)
            if not secret:
                raise ConfigError(f"the environment has no '{config.token}', which is to hold the token")
            self._headers["Authorization"] = f"Bearer {secret}"

    def __call__(self, batch: Batch) -> Scored:
        """Raises Broken ("http") when the last attempt has failed."""
        body = msgspec.json.encode(self._question(batch))
        end = time.monotonic() + 0.9 * self._config.timeout
        attempts = self._config.retries + 1
        for attempt in range(attempts):
            try:
                answer = self._post(body, end)
                return openrlhf_answer(answer, len(batch))
            except _Again as error:
                pause = _FIRST_PAUSE * 2**attempt
                if attempt == attempts - 1 or time.monotonic() + pause >= end:
                    raise Broken("http", f"{self._config.url}: {error}, attempt {attempt + 1} of {attempts}") from None
                time.sleep(pause)
        raise AssertionError("at least one attempt is made")

    def _question(self, batch: Batch) -> dict[str, Any]:
        if self._config.protocol == "json":
            return msgspec.structs.asdict(batch)
        prompts = [text_of(prompt) for prompt in batch.prompts]
        queries = [prompt + text_of(completion) for prompt, completion in zip(prompts, batch.completions)]
        return {"query": queries, "prompts": prompts, "labels": labels_of(batch, self._config.answer)}

    def _post(self, body: bytes, end: float) -> Any:
        kind = http.client.HTTPSConnection if self._url.scheme == "https" else http.client.HTTPConnection
        link = kind(self._url.hostname or "", self._url.port, timeout=_left(end))
        target = (self._url.path or "/") + (f"?{self._url.query}" if self._url.query else "")
        try:
            link.request("POST", target, body, self._headers)
            sock = link.sock  # the link lets go of it when the server will close
            answer = link.getresponse()
            text = self._read(sock, answer, end)
        except TimeoutError:
            raise _Again("no answer in time") from None
        except (OSError, http.client.HTTPException) as error:
            raise _Again(f"{type(error).__name__} {error}".strip()) from None
        finally:
            link.close()
        if answer.status == 429 or answer.status >= 500:
            raise _Again(f"status {answer.status}")
        if answer.status != 200:
            raise Broken("http", f"{self._config.url}: status {answer.status} {text[:100]!r}")
        try:
            return msgspec.json.decode(text)
        except (msgspec.MsgspecError, RecursionError) as error:
            raise Broken("http", f"{self._config.url} answered what is not JSON: {error}") from None

    def _read(self, sock: socket.socket, answer: http.client.HTTPResponse, end: float) -> bytes:
        """The body, at most LARGEST; a server that drips it is cut off at the end like one that is silent."""
        pieces: list[bytes] = []
        size = 0
        while True:
            sock.settimeout(_left(end))
            piece = answer.read1(1 << 16)
            if not piece:
                return b"".join(pieces)
            size += len(piece)
            if size > LARGEST:
                raise Broken("too large", f"{self._config.url} answered more than {LARGEST} bytes")
            pieces.append(piece)


def _left(end: float) -> float:
    left = end - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left
