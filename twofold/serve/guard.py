"""Guard: the outermost ASGI layer, which says no before anything else runs.

    request id, log, last resort ▸ Host ▸ key ▸ lame duck ▸ content type ▸ body size and time ▸ the app

Decisions are made on `scope["path"]`, never on a URL rebuilt from headers: a Host header once opened other servers.
Every route needs a key but the two in OPEN, also routes that do not exist.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import hmac
import logging
import re
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from ..core import TwofoldError
from .config import ServeConfig
from .errors import ANTHROPIC, HttpError

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

log = logging.getLogger("twofold.access")

OPEN = frozenset({"/livez", "/readyz"})
POLLED = OPEN | {
    "/health",
    "/metrics",
    "/stats",
    "/runs",
    "/history",
    "/requests",
}  # asked every few seconds: no line for each
HOST = re.compile(r"(?P<name>[A-Za-z0-9_.-]{1,253}|\[[0-9A-Fa-f:.]{2,45}\])(:\d{1,5})?")
REQUEST_ID = re.compile(rb"[A-Za-z0-9_.:-]{1,64}")
FORMS = "/v1/files"  # the one path that takes a form
FORM_BYTES = 16 * 1024  # what a form may have around its file
LINGER_SECONDS = 1.0
HARDENING = [
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"cache-control", b"no-store"),
]


class Keys:
    """The keys, as digests; a key is found in the same time wherever it stands and whatever was sent."""

    def __init__(self, keys: tuple[str, ...]) -> None:
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    def __bool__(self) -> bool:
        return bool(self._digests)

    def find(self, given: bytes) -> str | None:
        """A name for the key's owner, or None for a key that is not one."""
        digest = hashlib.sha256(given).digest()
        owner = None
        for known in self._digests:
            if hmac.compare_digest(digest, known):
                owner = hashlib.sha256(b"owner" + known).hexdigest()[:16]
        return owner


class Guard:
    """`draining` is asked at each request; `owner` and `request_id` are left in the scope for the app."""

    def __init__(self, app: App, config: ServeConfig, draining: Callable[[], bool]) -> None:
        self.app = app
        self.draining = draining
        self.renew(config)

    def renew(self, config: ServeConfig) -> None:
        """Other settings from the next request on; those under way keep theirs."""
        self.config = config
        self.keys = Keys(config.api_keys)
        self.hosts = config.hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return
        exchange = Exchange(scope, receive, send, self.config)
        try:
            try:
                self._admit(scope, exchange)
                await self.app(scope, exchange.receive, exchange.send)
            except ClientDisconnect:
                exchange.status = exchange.status or 499
            except HTTPException as error:
                await exchange.refuse(HttpError(error.status_code, error.detail), error.headers)
            except TwofoldError as error:
                await exchange.refuse(HttpError.of(error))
            except Exception as error:
                log.exception("request failed", extra={"request_id": exchange.id})
                await exchange.refuse(HttpError.of(error))
        finally:
            exchange.log()

    def _admit(self, scope: Scope, exchange: Exchange) -> None:
        headers = scope["headers"]
        self._check_host(_all(headers, b"host"))
        scope["owner"] = ""
        if self.keys and scope["path"] not in OPEN:
            scope["owner"] = self._check_key(headers)
        if scope["method"] not in ("POST", "PUT", "PATCH", "DELETE"):
            return
        if self.draining():
            exchange.close_after = True
            raise HttpError(503, "the server is going down: ask another", code="draining", retry_after=5)
        if scope["method"] == "DELETE" and not _has_body(headers):
            return
        kind = b"".join(_all(headers, b"content-type")).split(b";")[0].strip().lower()
        if scope["path"] == FORMS and kind == b"multipart/form-data":
            self._check_origin(headers)
        elif kind != b"application/json":
            raise HttpError(415, "send the body with 'Content-Type: application/json'", code="content_type")
        sizes = _all(headers, b"content-length")
        if sizes and sizes[0].isdigit() and int(sizes[0]) > exchange.most_bytes:
            raise exchange.too_large()

    def _check_host(self, given: list[bytes]) -> None:
        match = HOST.fullmatch(given[0].decode("latin-1")) if len(given) == 1 else None
        if match is None:
            raise HttpError(400, "exactly one well-formed Host header is needed", code="bad_host")
        if self.hosts is not None and match["name"].lower() not in self.hosts:
            raise HttpError(403, "this Host is not one the server answers for: see allowed_hosts", code="bad_host")

    def _check_origin(self, headers: list[tuple[bytes, bytes]]) -> None:
        """A browser sends forms to other sites without asking them first: none of those is taken."""
        origins, host = _all(headers, b"origin"), _all(headers, b"host")[0]
        if origins and origins[0].partition(b"://")[2].lower() != host.lower():
            raise HttpError(403, "a form from another site is not taken", code="bad_origin")

    def _check_key(self, headers: list[tuple[bytes, bytes]]) -> str:
        given = [_credential(value) for value in _all(headers, b"authorization")] or _all(headers, b"x-api-key")
        owner = self.keys.find(given[0] if len(given) == 1 else b"")
        if owner is None:
            raise HttpError(
                401,
                "an API key is needed: send 'Authorization: Bearer KEY' or 'x-api-key: KEY'",
                code="invalid_api_key",
            )
        return owner


class Exchange:
    """One request and its answer on their way through the guard."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, config: ServeConfig) -> None:
        self._scope = scope
        self._receive = receive
        self._send = send
        self._limits = config.limits
        given = _all(scope["headers"], b"x-request-id")
        if len(given) == 1 and REQUEST_ID.fullmatch(given[0]):
            self.id = given[0].decode()
        else:
            self.id = secrets.token_hex(8)
        scope["request_id"] = self.id
        self.began = scope["began"] = time.monotonic()
        self.status: int | None = None
        self.close_after = False
        form = scope["path"] == FORMS
        self.most_bytes = self._limits.file_bytes + FORM_BYTES if form else self._limits.body_bytes
        self._most_seconds = self._limits.file_seconds if form else self._limits.body_seconds
        self._body_bytes = 0
        self._body_ended = scope["method"] in ("GET", "HEAD", "OPTIONS", "DELETE") and not _has_body(scope["headers"])

    async def receive(self) -> Message:
        """The body with its limits; after its end, the client's leaving.

        Raises:
            HttpError: 413 for too many bytes, 408 for too many seconds.
        """
        if self._body_ended:
            return await self._receive()
        left = self.began + self._most_seconds - time.monotonic()
        try:
            message = await asyncio.wait_for(self._receive(), max(left, 0.0))
        except TimeoutError:
            raise HttpError(
                408, f"the body did not end within {self._most_seconds:g} seconds", code="body_timeout"
            ) from None
        if message["type"] == "http.request":
            self._body_bytes += len(message.get("body", b""))
            if self._body_bytes > self.most_bytes:
                raise self.too_large()
            self._body_ended = not message.get("more_body", False)
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = list(message.get("headers", []))
            names = {name for name, _ in headers}
            headers += [(name, value) for name, value in HARDENING if name not in names]
            headers.append((b"x-request-id", self.id.encode()))
            if self.close_after or not self._body_ended:  # what is left of the body must not be read as a request
                headers.append((b"connection", b"close"))
            message = {**message, "headers": headers}
        await self._send(message)

    async def refuse(self, error: HttpError, more: Mapping[str, str] | None = None) -> None:
        """Answer with an error, if nothing was answered yet, and let the client read it."""
        if self.status is not None:
            return
        body = error.body(in_shape(self._scope["path"]))
        headers = error.headers(body) + [(k.lower().encode(), v.encode()) for k, v in (more or {}).items()]
        if error.status == 401:
            headers.append((b"www-authenticate", _challenge(self._scope)))
        if self._scope["method"] == "HEAD":
            body = b""
        await self.send({"type": "http.response.start", "status": error.status, "headers": headers})
        await self.send({"type": "http.response.body", "body": body, "more_body": True})
        if not self._body_ended and error.status != 408:
            await self._linger()
        await self.send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _linger(self) -> None:
        """Read a little of an unwanted body: closing on unread bytes would reset the answer before it is read."""
        try:
            async with asyncio.timeout(LINGER_SECONDS):
                seen = 0
                while seen < 8 * self.most_bytes:
                    message = await self._receive()
                    seen += len(message.get("body", b""))
                    if message["type"] == "http.disconnect" or not message.get("more_body", False):
                        return
        except TimeoutError:
            return

    def too_large(self) -> HttpError:
        return HttpError(413, f"the body is more than {self.most_bytes} bytes: send less", code="body_too_large")

    def log(self) -> None:
        """One line for each request: never its content, its query or its key."""
        path = self._scope["path"]
        polled = path in POLLED or path.startswith("/runs/")
        log.log(
            logging.DEBUG if polled and self.status == 200 else logging.INFO,
            "%s %s %s",
            self._scope["method"],
            path if len(path) < 200 and path.isprintable() else repr(path[:200]),
            self.status or 499,
            extra={
                "request_id": self.id,
                "trace_id": getattr(self._scope.get("record"), "trace_id", None),
                "status": self.status or 499,
                "seconds": round(time.monotonic() - self.began, 4),
                "client": (self._scope.get("client") or ("",))[0],
            },
        )


def _all(headers: list[tuple[bytes, bytes]], name: bytes) -> list[bytes]:
    return [value for key, value in headers if key == name]


def _has_body(headers: list[tuple[bytes, bytes]]) -> bool:
    return any(key == b"transfer-encoding" or (key == b"content-length" and value != b"0") for key, value in headers)


def _credential(header: bytes) -> bytes:
    """The key in an Authorization header: a Bearer token, or the password of Basic (what a browser asks for)."""
    scheme, _, value = header.partition(b" ")
    value = value.strip()
    if scheme.lower() == b"bearer":
        return value
    if scheme.lower() == b"basic":
        try:
            return base64.b64decode(value, validate=True).partition(b":")[2]
        except (binascii.Error, ValueError):
            return b""
    return b""


def in_shape(path: str) -> bool:
    """Whether errors on this path are in Anthropic's shape."""
    return path == ANTHROPIC or path.startswith(f"{ANTHROPIC}/")


def _challenge(scope: Scope) -> bytes:
    """A browser that opens the page is asked for the key as a password; programs are told what to send."""
    wants_page = any(b"text/html" in value for value in _all(scope["headers"], b"accept"))
    return b'Basic realm="Twofold: any name, the API key as password"' if wants_page else b"Bearer"
