"""Inside: a request that the server asks itself, through the same routes as a client's, without a socket."""

from __future__ import annotations

import asyncio
import secrets
from typing import Any

import msgspec
from starlette.exceptions import HTTPException

from ...core import TwofoldError
from ..errors import HttpError
from ..guard import App, Message

LOW = 1 << 20  # added to a request's own priority: behind everything that somebody waits for


class Inside:
    """`app` is what stands behind the guard."""

    def __init__(self, app: App) -> None:
        self.app = app

    async def post(self, path: str, body: dict[str, Any], owner: str, seconds: float) -> tuple[int, str, bytes]:
        """Status, request id and body of the answer, which may take `seconds`."""
        name = f"batch_{secrets.token_hex(8)}"
        data = msgspec.json.encode(body)
        scope: dict[str, Any] = {
            "type": "http", "method": "POST", "path": path, "raw_path": path.encode(), "query_string": b"",
            "headers": [(b"content-type", b"application/json"), (b"content-length", str(len(data)).encode())],
            "client": None, "server": None, "scheme": "http", "http_version": "1.1", "asgi": {"version": "3.0"},
            "root_path": "", "owner": owner, "request_id": name, "priority": LOW, "seconds": seconds,
        }  # fmt: skip
        status, parts, sent = 500, list[bytes](), False

        async def receive() -> Message:
            nonlocal sent
            if sent:
                await asyncio.Event().wait()  # nobody leaves
            sent = True
            return {"type": "http.request", "body": data, "more_body": False}

        async def send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            else:
                parts.append(message.get("body", b""))

        try:
            await self.app(scope, receive, send)
        except HTTPException as error:
            status, parts = error.status_code, [HttpError(error.status_code, error.detail).body()]
        except TwofoldError as error:
            told = HttpError.of(error)
            status, parts = told.status, [told.body()]
        return status, name, b"".join(parts)
