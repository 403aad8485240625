"""Shared: what all models of a server have in common: answers, files and batches that are kept, and the way out."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

from .batches import Desk, Files, Inside
from .batches.desk import spare
from .config import ServeConfig
from .guard import App, Receive, Scope, Send
from .ledger import Ledger
from .metrics import render
from .reload import Reload, overlay
from .responses import Store

if TYPE_CHECKING:
    from .app import Api


class Shared:
    """`apis` are the models, the first the default; `app` is what stands behind the guard.

    `base` holds the settings of the command line, over which files may say otherwise.
    `draining` is set by the server when it is told to leave.
    """

    def __init__(self, config: ServeConfig, base: ServeConfig | None = None) -> None:
        self.config = config
        self.reload = Reload(base or config, config)
        self.reload.told.append(self._renew)
        self.draining = False
        self.app: App | None = None
        self.responses = Store(config.limits)
        self.ledger = Ledger(config.limits)
        self.apis: list[Api] = []

    def api(self, name: str | None) -> Api:
        """Whose a request for the model `name` is; the first's when nobody knows it, who will say so."""
        return next((api for api in self.apis if name and api.knows(name)), self.apis[0])

    @property
    def live(self) -> int:
        """Sequences that are under way, of all models."""
        return sum(len(api.client.live) for api in self.apis)

    def render_metrics(self) -> bytes:
        """What Prometheus scrapes: every model's metrics, told apart by their labels."""
        return render([api.metrics for api in self.apis])

    @cached_property
    def files(self) -> Files:
        """Made when first needed: a server that is asked for no file keeps no folder."""
        return Files(self.config.files_dir, self.config.limits)

    @cached_property
    def desk(self) -> Desk:
        return Desk(self.files, Inside(self._ask), spare(lambda name: self.api(name).client))

    def _renew(self, new: ServeConfig) -> None:
        self.config = new
        self.responses.limits = self.ledger.limits = new.limits
        if "files" in vars(self):
            self.files.limits = new.limits
        for api in self.apis:
            api.config = api.client.config = overlay(api.config, new)

    def start(self) -> None:
        """Go on with the batches that an earlier server left in the operator's folder, and begin to look."""
        if self.config.files_dir is not None:
            self.desk.start()
        for api in self.apis:
            api.history.start()

    async def stop(self) -> None:
        for api in self.apis:
            api.history.stop()
        if "desk" in vars(self):
            await self.desk.stop()

    def close(self) -> None:
        if "files" in vars(self):
            self.files.close()

    async def _ask(self, scope: Scope, receive: Receive, send: Send) -> None:
        assert self.app is not None, "build_app sets it"
        await self.app(scope, receive, send)
