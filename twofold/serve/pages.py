"""The pages (chat, overview, training): static files, read once, served under a content policy that lets nothing in.

When keys are set a page needs one too (every route does): a browser asks for it as the password of HTTP Basic.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from .errors import HttpError

FOLDER = Path(__file__).parent / "ui"
KINDS = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
    ".png": "image/png",
    ".ico": "image/x-icon",
    ".woff2": "font/woff2",
    ".json": "application/json",
}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; font-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


class Pages:
    """The files of a folder by their path below it; nothing outside it can be named, since nothing is looked up."""

    def __init__(self, folder: Path = FOLDER) -> None:
        self.files: dict[str, tuple[bytes, str, str]] = {}
        for path in sorted(folder.rglob("*")):
            if path.is_file() and path.suffix in KINDS:
                data = path.read_bytes()
                etag = f'"{hashlib.sha256(data).hexdigest()[:16]}"'
                self.files[path.relative_to(folder).as_posix()] = (data, KINDS[path.suffix], etag)

    def routes(self) -> list[Route]:
        return [
            Route("/", self.index, methods=["GET"]),
            Route("/overview", self.overview, methods=["GET"]),
            Route("/train", self.train, methods=["GET"]),
            Route("/favicon.ico", self.icon, methods=["GET"]),
            Route("/ui/{name:path}", self.file, methods=["GET"]),
        ]

    async def index(self, request: Request) -> Response:
        return self._answer(request, "index.html")

    async def train(self, request: Request) -> Response:
        return self._answer(request, "train.html")

    async def overview(self, request: Request) -> Response:
        return self._answer(request, "overview.html")

    async def icon(self, request: Request) -> Response:
        """What browsers ask for by themselves, whatever a page says its icon is."""
        return self._answer(request, "icon.svg")

    async def file(self, request: Request) -> Response:
        return self._answer(request, request.path_params["name"])

    def _answer(self, request: Request, name: str) -> Response:
        if name not in self.files:
            raise HttpError(404, "the page has no such file")
        data, kind, etag = self.files[name]
        headers = {
            "content-security-policy": POLICY,
            "cross-origin-opener-policy": "same-origin",
            "cache-control": "no-cache",
            "etag": etag,
        }
        if request.headers.get("if-none-match") == etag:
            return Response(status_code=304, headers=headers)
        return Response(data, media_type=kind, headers=headers)
