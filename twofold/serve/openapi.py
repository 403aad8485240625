"""The OpenAPI document, made from the routes, their rows (described.py) and the structs that bodies are decoded into.

Every status that a route can answer with is listed, so that a client that finds another has found a mistake of ours.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from http import HTTPStatus
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from .. import __version__
from .described import EVENTS, JSON, ROWS, Row
from .errors import AnthropicError, ErrorBody
from .guard import in_shape

Schema = dict[str, Any]

# Whatever the route: a bad Host or query, no key, a foreign Host, another method, too large a head.
ALWAYS = (400, 401, 403, 405, 431)
# Whoever sends a body: it may come too slowly, be too large or of another kind, and the server may be going down.
SENT = (408, 413, 415, 503)
REF = "#/components/schemas/{name}"


def methods(route: Route) -> list[str]:
    return sorted((route.methods or set()) - {"HEAD"})


def plain_path(route: Route) -> str:
    """A route's path as OpenAPI writes it, its converters left out."""
    return re.sub(r"{(\w+):\w+}", r"{\1}", route.path)


def described(routes: Sequence[BaseRoute]) -> Iterator[tuple[str, str, Row]]:
    """Method, path and row of every route; one without a row of its own is said to be what all are."""
    for route in routes:
        if isinstance(route, Route):
            for method in methods(route):
                path = plain_path(route)
                yield method, path, ROWS.get((method, path)) or Row(path)


def document(routes: Sequence[BaseRoute]) -> Schema:
    """The whole document."""
    rows = list(described(routes))
    kinds = {kind for _, _, row in rows for kind in (row.body, row.answer) if kind is not None}
    found = sorted(kinds, key=lambda kind: f"{kind.__module__}.{kind.__name__}")
    schemas, components = msgspec.json.schema_components([ErrorBody, AnthropicError, *found], ref_template=REF)
    schema = dict(zip([ErrorBody, AnthropicError, *found], schemas))
    paths: dict[str, Schema] = {}
    for method, path, row in rows:
        paths.setdefault(path, {})[method.lower()] = _operation(method, path, row, schema)
    return {
        "openapi": "3.1.0",
        "info": {"title": "Twofold", "version": __version__},
        "security": [{}, {"bearer": []}, {"key": []}],
        "paths": paths,
        "components": {
            "schemas": components,
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
            },
        },
    }


def _operation(method: str, path: str, row: Row, schema: dict[type, Schema]) -> Schema:
    found: Schema = {"summary": row.summary, "responses": _responses(method, path, row, schema)}
    inside = [{"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
              for name in re.findall(r"{(\w+)}", path)]  # fmt: skip
    asked = [{"name": name, "in": "query", "schema": kind} for name, kind in row.query.items()]
    if inside or asked:
        found["parameters"] = [*inside, *asked]
    if row.form is not None:
        found["requestBody"] = {"required": True, "content": {"multipart/form-data": {"schema": row.form}}}
    elif row.body is not None:
        found["requestBody"] = {"required": True, "content": {JSON: {"schema": schema[row.body]}}}
    return found


def _responses(method: str, path: str, row: Row, schema: dict[type, Schema]) -> Schema:
    if row.kinds:
        content: Schema = {kind: {"schema": {"type": "string"}} for kind in row.kinds}
    else:
        content = {JSON: {"schema": schema[row.answer] if row.answer else {"type": "object"}}}
    if row.streams:
        content[EVENTS] = {"schema": {"type": "string"}}
    found: Schema = {"200": {"description": "What was asked for.", "content": content}}
    error = schema[AnthropicError if in_shape(path) else ErrorBody]
    statuses = {*ALWAYS, *row.more, *(SENT if method in ("POST", "PUT", "PATCH", "DELETE") else ())}
    for status in sorted(statuses):
        shape = {"type": "object"} if status == 503 and method == "GET" else error  # probes say in 503 how it is
        found[str(status)] = {"description": HTTPStatus(status).phrase, "content": {JSON: {"schema": shape}}}
    return found


class OpenApi:
    """The document at /openapi.json, made when it is first asked for."""

    def __init__(self, routes: Sequence[BaseRoute]) -> None:
        self._routes = routes
        self._body = b""

    def routes(self) -> list[BaseRoute]:
        return [Route("/openapi.json", self.get, methods=["GET"])]

    async def get(self, request: Request) -> Response:
        self._body = self._body or msgspec.json.encode(document([*self._routes, *self.routes()]))
        return Response(self._body, media_type=JSON)
