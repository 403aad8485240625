"""The routes of files and batches."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import BaseRoute, Route

from ...core import RequestError
from ..answers import json
from ..bodies import decode
from ..errors import HttpError
from ..responses.shapes import check_metadata
from .desk import Desk
from .files import Files, Writing
from .multipart import Multipart, Part, boundary
from .shapes import BatchList, BatchObject, BatchRequest, FileDeleted, FileList, FileObject

if TYPE_CHECKING:
    from ..app import Api

Listed = TypeVar("Listed", FileObject, BatchObject)

MOST_LISTED = 10_000
MOST_FIELD = 1000
CHUNK = 1 << 20
EXPIRY = (3600, 30 * 86400)


class Batches:
    def __init__(self, api: Api) -> None:
        self.api = api

    @property
    def files(self) -> Files:
        return self.api.shared.files

    @property
    def desk(self) -> Desk:
        return self.api.shared.desk

    def routes(self) -> list[BaseRoute]:
        file, batch = "/v1/files/{name}", "/v1/batches/{name}"
        return [
            Route("/v1/files", self.upload, methods=["POST"]),
            Route("/v1/files", self.list_files, methods=["GET"]),
            Route(file, self.get_file, methods=["GET"]),
            Route(file, self.delete_file, methods=["DELETE"]),
            Route(f"{file}/content", self.content, methods=["GET"]),
            Route("/v1/batches", self.create, methods=["POST"]),
            Route("/v1/batches", self.list_batches, methods=["GET"]),
            Route(batch, self.get_batch, methods=["GET"]),
            Route(f"{batch}/cancel", self.cancel, methods=["POST"]),
        ]

    # -- files ------------------------------------------------------------------------------------------------------

    async def upload(self, request: Request) -> Response:
        """A form with `purpose` and `file`, written to the disk as it comes."""
        form = Multipart(boundary(request.headers.get("content-type", "")))
        fields: dict[str, bytes] = {}
        filename: str | None = None
        with self.files.writing() as writing:
            part: Part | None = None
            async for chunk in request.stream():
                for found in form.feed(chunk):
                    if isinstance(found, Part):
                        part = found
                        if part.name in fields or (part.name == "file" and filename is not None):
                            raise RequestError("a form has each field once", part.name)
                        if part.name == "file":
                            filename = part.filename or "file"
                        else:
                            fields[part.name] = b""
                    else:
                        _take(part, found, fields, writing)
            form.close()
            if filename is None:
                raise RequestError("file is missing: send it as a part of the form", "file")
            if fields.pop("purpose", None) != b"batch":
                raise RequestError("purpose is batch: no other is done by this version", "purpose")
            return json(writing.keep(request.scope["owner"], filename, "batch", _expiry(fields)))

    async def list_files(self, request: Request) -> Response:
        files = self.files.listing(request.scope["owner"])
        if (purpose := request.query_params.get("purpose")) is not None:
            files = [file for file in files if file.purpose == purpose]
        page, more = _page(request, files)
        return json(FileList(page, *_ends(page), more))

    async def get_file(self, request: Request) -> Response:
        return json(self._file(request))

    async def delete_file(self, request: Request) -> Response:
        file = self._file(request)
        if self.desk.uses(file.id):
            raise HttpError(409, "a batch reads this file: cancel it first, or wait for its end", code="file_in_use")
        self.files.delete(file.id)
        return json(FileDeleted(file.id))

    async def content(self, request: Request) -> Response:
        file = self._file(request)
        headers = {"content-length": str(file.bytes)}
        return StreamingResponse(
            _bytes(self.files.data(file.id)), media_type="application/octet-stream", headers=headers
        )

    def _file(self, request: Request) -> FileObject:
        return self.files.get(request.scope["owner"], request.path_params["name"])

    # -- batches ----------------------------------------------------------------------------------------------------

    async def create(self, request: Request) -> Response:
        asked = decode(BatchRequest, await request.body())
        check_metadata(asked.metadata)
        if asked.output_expires_after:
            raise RequestError("output_expires_after is not done by this version: leave it out", "output_expires_after")
        return json(self.desk.create(request.scope["owner"], asked))

    async def list_batches(self, request: Request) -> Response:
        page, more = _page(request, self.desk.listing(request.scope["owner"]))
        return json(BatchList(page, *_ends(page), more))

    async def get_batch(self, request: Request) -> Response:
        return json(self.desk.get(request.scope["owner"], request.path_params["name"]).show())

    async def cancel(self, request: Request) -> Response:
        return json(await self.desk.cancel(self.desk.get(request.scope["owner"], request.path_params["name"])))


def _take(part: Part | None, data: bytes, fields: dict[str, bytes], writing: Writing) -> None:
    assert part is not None
    if part.name == "file":
        writing.write(data)
    elif len(fields[part.name]) + len(data) > MOST_FIELD:
        raise RequestError(f"a field of the form has at most {MOST_FIELD} bytes", part.name)
    else:
        fields[part.name] += data


def _expiry(fields: dict[str, bytes]) -> int | None:
    anchor, seconds = fields.pop("expires_after[anchor]", None), fields.pop("expires_after[seconds]", None)
    if fields:
        raise RequestError("a form with a file has purpose, file and expires_after", next(iter(fields)))
    if anchor is None and seconds is None:
        return None
    whole = int(seconds) if seconds is not None and seconds.isdigit() and len(seconds) < 10 else 0
    if anchor != b"created_at" or not EXPIRY[0] <= whole <= EXPIRY[1]:
        raise RequestError("expires_after is created_at and an hour to 30 days, in seconds", "expires_after")
    return whole


def _page(request: Request, found: Sequence[Listed]) -> tuple[list[Listed], bool]:
    """What `after`, `limit` and `order` leave of a list, and whether there is more."""
    query = request.query_params
    limit, order, after = query.get("limit", "100"), query.get("order", "desc"), query.get("after")
    if not (limit.isascii() and limit.isdecimal() and len(limit) < 9 and 1 <= int(limit) <= MOST_LISTED):
        raise RequestError(f"limit is 1 to {MOST_LISTED}, not {limit!r:.40}", "limit")
    if order not in ("asc", "desc"):
        raise RequestError(f"order is asc or desc, not {order!r:.40}", "order")
    items = list(found if order == "desc" else reversed(found))
    if after is not None:
        place = next((n for n, item in enumerate(items, 1) if item.id == after), None)
        if place is None:
            raise RequestError(f"nothing here is called {after!r:.60}", "after")
        items = items[place:]
    return items[: int(limit)], len(items) > int(limit)


def _ends(page: Sequence[Any]) -> tuple[str | None, str | None]:
    return (page[0].id, page[-1].id) if page else (None, None)


async def _bytes(path: Path) -> AsyncIterator[bytes]:
    with path.open("rb") as stream:
        while data := await asyncio.to_thread(stream.read, CHUNK):
            yield data
