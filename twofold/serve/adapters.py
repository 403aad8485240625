"""Adapters of a served model: chosen by a request's `model`, loaded, listed and unloaded while it runs.

    POST /v1/load_lora_adapter    {"lora_name": "sql", "lora_path": "sql-v3"}   vLLM's routes and bodies
    POST /v1/unload_lora_adapter  {"lora_name": "sql"}                          who has it goes on, others get 404

A request keeps the key (`engine/adapters.py`) that its adapter had when it came. Each new process of the model is
told all keys that are listed or that an accepted request still has.

A path names what will run beside the model, so it is taken only below `lora_dir`, and only from a client with a key.
"""

from __future__ import annotations

import asyncio
import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import BaseRoute, Route

from ..core import CapacityError, CheckpointError, ConfigError, RequestError, TwofoldError
from .bodies import decode
from .errors import HttpError

if TYPE_CHECKING:
    from .app import Api

log = logging.getLogger("twofold.serve")

LONGEST_PATH = 1024


class LoadRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """POST /v1/load_lora_adapter; with `load_inplace` a name that is taken gets these weights."""

    lora_name: str
    lora_path: str
    load_inplace: bool = False


class UnloadRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """POST /v1/unload_lora_adapter; adapters have no numbers here, so one that is sent says nothing."""

    lora_name: str
    lora_int_id: int | None = None


class Listed(msgspec.Struct, frozen=True):
    """An adapter that may be asked for."""

    name: str
    key: str
    path: str
    rank: int
    nbytes: int
    base: str
    created: int


class Adapters:
    """What is listed, by name, and the two routes that change it."""

    def __init__(self, api: Api) -> None:
        self.api = api
        self.listed: dict[str, Listed] = {}
        self._leaving: set[str] = set()
        self._one_at_a_time = asyncio.Lock()
        api.client.asks.on_refused = self._refused

    def routes(self) -> list[BaseRoute]:
        return [
            Route("/v1/load_lora_adapter", self.load, methods=["POST"]),
            Route("/v1/unload_lora_adapter", self.unload, methods=["POST"]),
        ]

    def cards(self) -> list[dict[str, Any]]:
        """Their entries in `/v1/models`."""
        return [self.card(name) for name in self.listed]

    def card(self, name: str) -> dict[str, Any]:
        info, listed = self.api.client.info, self.listed[name]
        return {
            "id": name,
            "object": "model",
            "created": listed.created,
            "owned_by": "twofold",
            "root": listed.path,
            "parent": self.api.config.name,
            "max_model_len": info.max_len if info else None,
        }

    # -- the routes -------------------------------------------------------------------------------------------------

    async def load(self, request: Request) -> Response:
        self._check_allowed(request)
        body = decode(LoadRequest, await request.body())
        path = self._inside(body.lora_path)
        try:
            await asyncio.shield(self.add(body.lora_name, path, replace=body.load_inplace))
        except (CheckpointError, ConfigError, CapacityError) as error:
            param = "lora_name" if isinstance(error, ConfigError) else "lora_path"
            raise HttpError(400, str(error), param=param, code="invalid_value") from None
        except RequestError as error:
            raise HttpError(400, str(error), param="lora_name", code="invalid_value") from None
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")

    async def unload(self, request: Request) -> Response:
        self._check_allowed(request)
        body = decode(UnloadRequest, await request.body())
        if body.lora_name not in self.listed:
            raise HttpError(404, f"no adapter '{body.lora_name:.80}' here", param="lora_name", code="model_not_found")
        await asyncio.shield(self.remove(body.lora_name))
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")

    def _check_allowed(self, request: Request) -> None:
        config = self.api.config
        if config.lora_dir is None:
            raise HttpError(403, "adapters are not loaded live here: start with --lora-dir DIR", code="not_allowed")
        if not request.scope["owner"] and not config.allow_lora_loading:
            raise HttpError(
                403, "adapters are loaded live only with an API key: start with --api-keys KEY", code="not_allowed"
            )

    def _inside(self, given: str) -> Path:
        """The directory that a client named, which lies below `lora_dir`, links followed."""
        assert self.api.config.lora_dir is not None
        try:
            base = self.api.config.lora_dir.resolve()
            path = (base / given).resolve()
            inside = 0 < len(given) <= LONGEST_PATH and path != base and path.is_relative_to(base) and path.is_dir()
        except (OSError, ValueError, RuntimeError):
            inside = False
        if not inside:
            raise HttpError(400, "lora_path is no directory below --lora-dir", param="lora_path", code="invalid_value")
        return path

    # -- what is listed ---------------------------------------------------------------------------------------------

    async def start(self, modules: tuple[tuple[str, Path], ...]) -> None:
        """Load what the server was started with."""
        for name, path in modules:
            await self.add(name, path.resolve())

    async def add(self, name: str, path: Path, *, replace: bool = False) -> None:
        """List an adapter.

        Raises:
            TwofoldError: a name that is taken or cannot be, or no adapter for this model there.
        """
        if name == self.api.config.name or any(a is not self.api and a.knows(name) for a in self.api.shared.apis):
            raise RequestError(f"'{name}' is a model's own name here: choose another")
        async with self._one_at_a_time:
            client, what = self.api.client, {"name": name, "path": str(path)}
            told = await client.ask("load_adapter", **what, replace=replace)
            before = self.listed.get(name)
            listed = self.listed[name] = Listed(**told, created=int(time.time()))
            client.asks.standing[listed.key] = ("load_adapter", {**what, "key": listed.key, "replace": True})
            self._leaving.discard(listed.key)
            if before is not None and before.key != listed.key:
                self._leave(before)
        log.info("adapter %s: rank %d, %d bytes, from %s", name, listed.rank, listed.nbytes, path)

    async def remove(self, name: str) -> None:
        """List an adapter no more. Requests that have it go on, in the next process of the model too."""
        async with self._one_at_a_time:
            if (listed := self.listed.pop(name, None)) is None:
                return
            self._leave(listed)
            try:
                await self.api.client.ask("unload_adapter", key=listed.key)
            except TwofoldError as error:  # it is listed no more; a process that is gone has forgotten it anyway
                log.warning("adapter %s: %s", name, error)
        log.info("adapter %s is unloaded", name)

    def _leave(self, listed: Listed) -> None:
        """A new process need not know an adapter any more than the requests that have it do."""
        client = self.api.client
        had = {accepted.request.adapter for accepted in client.live.values()}
        what = {"name": listed.name, "path": listed.path, "key": listed.key, "listed": False}
        client.asks.standing[listed.key] = ("load_adapter", what)
        self._leaving.add(listed.key)
        for key in self._leaving - had:
            self._leaving.discard(key)
            client.asks.standing.pop(key, None)

    def _refused(self, key: str, error: Exception) -> None:
        """A new process could not load it any more."""
        self.listed = {name: listed for name, listed in self.listed.items() if listed.key != key}
