"""Shared: what all models of a server have in common: answers, files and batches that are kept, and the way out."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

from .batches import Desk, Files, Inside
from .batches.desk import spare
from .client import EngineClient
from .config import ServeConfig
from .guard import App, Receive, Scope, Send
from .responses import Store


class Shared:
    """`client` finds a model's by the name that a request gives; `app` is what stands behind the guard.

    `draining` is set by the server when it is told to leave.
    """

    def __init__(self, config: ServeConfig, client: Callable[[str], EngineClient | None]) -> None:
        self.config = config
        self.draining = False
        self.app: App | None = None
        self.responses = Store(config.limits)
        self._client = client

    @cached_property
    def files(self) -> Files:
        """Made when first needed: a server that is asked for no file keeps no folder."""
        return Files(self.config.files_dir, self.config.limits)

    @cached_property
    def desk(self) -> Desk:
        return Desk(self.files, Inside(self._ask), spare(self._client))

    def start(self) -> None:
        """Go on with the batches that an earlier server left in the operator's folder."""
        if self.config.files_dir is not None:
            self.desk.start()

    async def stop(self) -> None:
        if "desk" in vars(self):
            await self.desk.stop()

    def close(self) -> None:
        if "files" in vars(self):
            self.files.close()

    async def _ask(self, scope: Scope, receive: Receive, send: Send) -> None:
        assert self.app is not None, "build_app sets it"
        await self.app(scope, receive, send)
