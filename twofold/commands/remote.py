"""A server with an OpenAI-compatible API, as the door's commands speak to it: the standard library's HTTP, no more."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..core import CapacityError, ConfigError, RequestError, TwofoldError

PATIENCE = 600.0
"""Seconds that an answer may take."""


class Server:
    """One server by its address, with or without the `/v1` at its end; `key` is left out, $TWOFOLD_API_KEY.

    Raises:
        ConfigError: `flag`, which gave the address, is none.
    """

    def __init__(self, url: str, key: str | None, flag: str) -> None:
        self.url = urllib.parse.urlsplit(url if "//" in url else f"http://{url}")
        try:
            known = self.url.scheme in ("http", "https") and self.url.hostname and self.url.port != 0
        except ValueError:  # a port that is no number
            known = False
        if not known:
            raise ConfigError(f"{flag} must look like http://127.0.0.1:8000, not '{url}'")
        key = key or os.environ.get("TWOFOLD_API_KEY")
        self._base = self.url.path.rstrip("/").removesuffix("/v1")
        self._headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})

    @contextmanager
    def asked(
        self, path: str, body: dict[str, Any] | None = None, *, below: str = "v1/"
    ) -> Iterator[http.client.HTTPResponse]:
        """The answer to one request below `/v1/` or another path, a POST where there is a body; read it inside.

        Raises:
            RequestError: the server refuses it; told in its words.
            CapacityError: it has no room now.
            TwofoldError: nobody answers there, or not as the API would.
        """
        kind = http.client.HTTPSConnection if self.url.scheme == "https" else http.client.HTTPConnection
        connection = kind(self.url.hostname or "", self.url.port, timeout=PATIENCE)
        try:
            data = None if body is None else json.dumps(body)
            connection.request("GET" if data is None else "POST", f"{self._base}/{below}{path}", data, self._headers)
            yield _checked(connection.getresponse())
        except (OSError, http.client.HTTPException, ValueError, LookupError, TypeError) as error:
            why = f"{type(error).__name__}: {error}"
            raise TwofoldError(f"{self.url.geturl()}: {why}; is `twofold serve` running?") from None
        finally:
            connection.close()

    def model(self, name: str | None = None) -> str:
        """The name of a model that the server has: `name`, or the first that it lists.

        Raises:
            ConfigError: it has none of that name.
        """
        with self.asked("models") as answer:
            found = [str(entry["id"]) for entry in json.loads(answer.read())["data"]]
            first = found[0]
        if name is not None and name not in found:
            raise ConfigError(f"{self.url.geturl()} has no model '{name}': it has {', '.join(found)}")
        return name or first


def _checked(response: http.client.HTTPResponse) -> http.client.HTTPResponse:
    if response.status == 200:
        return response
    text = response.read(4096).decode("utf-8", "replace")
    with contextlib.suppress(ValueError, KeyError, TypeError):
        text = json.loads(text)["error"]["message"]
    kind = CapacityError if response.status in (429, 503) else RequestError
    raise kind(f"the server answers {response.status}: {text}")
