"""serve: everything wired together, and the way out.

SIGTERM ─▶ lame duck: readyz 503, new requests 503, running ones go on ─▶ all done, or drain_seconds over
        ─▶ what is left gets a last error event ─▶ the model's process leaves ─▶ exit 0
again   ─▶ exit 1 at once
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import math
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence

import uvicorn

from ..core import ConfigError, TwofoldError
from ..engine.config import EngineConfig
from . import reload, wire
from .app import Api, build_app, routed
from .client import EngineClient
from .config import ServeConfig
from .fleet import Fleet, Member
from .guard import App
from .log import set_up, tell
from .process import COMMAND
from .protocol import guarded
from .shared import Shared
from .texts import Texts
from .tracing import Tracing

log = logging.getLogger("twofold.serve")


def serve(config: ServeConfig, engine: EngineConfig, *, command: Sequence[str] = COMMAND) -> int:
    """Serve until told to stop; the exit code.

    Raises:
        ConfigError: the address cannot be listened on.
        CheckpointError, CapacityError: the model cannot be loaded, found before or after its process has started.
    """
    set_up(config.log)
    base = with_keys(config)
    config = reload.read(base)
    if config.lora_modules or config.lora_dir is not None:
        engine = dataclasses.replace(engine, enable_lora=True)
    tracing = Tracing(config.otlp_traces_endpoint) if config.otlp_traces_endpoint else None
    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        try:
            return runner.run(_serve(config, base, engine, command, tracing))
        finally:
            if tracing is not None:
                runner.run(tracing.stop())


async def _serve(
    config: ServeConfig, base: ServeConfig, engine: EngineConfig, command: Sequence[str], tracing: Tracing | None
) -> int:
    shared = Shared(config, base)
    if tracing is not None:
        tracing.watch(shared.ledger)
    if config.log == "json":
        shared.ledger.ended.append(tell)
    for one in config.each():
        texts = Texts.load(one)
        start = wire.Start(str(one.model), dataclasses.asdict(engine), texts.eos_ids)
        Api(one, EngineClient(one, start, command), texts, shared)
    sock = listen(config)
    first = shared.apis[0]
    fleet = Fleet([Member(api, routed(api)) for api in shared.apis], config) if config.models else None
    server = Server(build_app(first, fleet), shared, config)
    if fleet is None:
        first.client.start()
    else:
        fleet.start()
    loaded = asyncio.create_task(_announce(first, config, sock, alone=fleet is None), name="announce")
    shared.start()
    loaded.add_done_callback(lambda task: server.leave() if not task.cancelled() and task.exception() else None)
    try:
        await server.serve(sockets=[sock])
    finally:
        await shared.stop()
        if fleet is not None:
            await fleet.stop()
        await asyncio.gather(*(api.client.stop() for api in shared.apis))
        shared.close()
        for api in shared.apis:
            api.judge.stop()
        sock.close()
        loaded.cancel()
    error = (await asyncio.gather(loaded, return_exceptions=True))[0]
    if isinstance(error, TwofoldError):
        raise error
    return 0


async def _announce(first: Api, config: ServeConfig, sock: socket.socket, *, alone: bool) -> None:
    """Say where to go, once there is something to find there; one model of several may fail by itself."""
    try:
        info = await first.client.first_ready
        await first.adapters.start(config.adapters)
        log.info("%s is ready: %d tokens of context, %d at once", first.config.name, info.max_len, info.max_running)
    except TwofoldError:
        if alone:
            raise
    url, names = address(config, sock), ", ".join(repr(api.config.name) for api in first.shared.apis)
    if config.enable_ui:
        print(f"Chat page: {url}/", flush=True)
    print(f"OpenAI API: {url}/v1  (model{'' if alone else 's'} {names})", flush=True)


def with_keys(config: ServeConfig) -> ServeConfig:
    """The keys of the environment when the settings have none, and a warning when strangers could come in."""
    if not config.api_keys:
        keys = tuple(key.strip() for key in os.environ.get("TWOFOLD_API_KEY", "").split(",") if key.strip())
        config = dataclasses.replace(config, api_keys=keys)
    if not config.api_keys and config.api_keys_file is None and not config.on_loopback:
        log.warning("whoever reaches %s:%d may use this server: set api_keys", config.host, config.port)
    return config


class Server(uvicorn.Server):
    """uvicorn's server with our own way out: its own closes the door at once and exits 143."""

    def __init__(self, app: App, shared: Shared, config: ServeConfig) -> None:
        self._protocol = guarded(config.limits)
        super().__init__(
            uvicorn.Config(
                app,
                http=self._protocol,
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                timeout_keep_alive=max(int(config.limits.keep_alive_seconds), 1),
                timeout_graceful_shutdown=2,
            )
        )
        self._shared = shared
        self._settings = config
        self._drain: asyncio.Task[None] | None = None
        shared.reload.told.append(self._renew)

    def _renew(self, config: ServeConfig) -> None:
        """Other limits for connections that come; times of the way out for all."""
        self._settings = config
        self._protocol.limits = config.limits
        self.config.timeout_keep_alive = max(int(config.limits.keep_alive_seconds), 1)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._told)
        loop.add_signal_handler(signal.SIGHUP, self._shared.reload.by_signal)
        try:
            yield
        finally:
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                loop.remove_signal_handler(number)

    def leave(self) -> None:
        """Stop serving without waiting for anybody."""
        self.should_exit = True

    def _told(self) -> None:
        if self._drain is not None:
            log.warning("told twice: leaving at once")
            sys.stderr.flush()
            os._exit(1)  # the model's process sees the end of its socket and leaves too
        self._shared.draining = True
        self._drain = asyncio.create_task(self._drain_out(), name="drain")

    async def _drain_out(self) -> None:
        shared, config = self._shared, self._settings
        await shared.stop()
        log.info("going down: %d sequences may finish within %g s", shared.live, config.drain_seconds)
        began = time.monotonic()
        while (passed := time.monotonic() - began) < config.drain_seconds:
            if not shared.live and passed >= config.lame_duck_seconds:
                break
            await asyncio.sleep(0.05)
        await asyncio.gather(*(api.client.stop() for api in shared.apis))
        left = config.drain_seconds - (time.monotonic() - began)
        self.config.timeout_graceful_shutdown = max(math.ceil(left), 2)  # for clients that still read their last words
        self.leave()


def listen(config: ServeConfig) -> socket.socket:
    """The listening socket; ConfigError with the way out when it cannot be had."""
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((config.host, config.port))
    except OSError as error:
        sock.close()
        raise ConfigError(
            f"cannot listen on {config.host}:{config.port} ({error.strerror or error}): choose another --port"
        ) from None
    return sock


def address(config: ServeConfig, sock: socket.socket) -> str:
    host = f"[{config.host}]" if ":" in config.host else config.host
    return f"http://{host}:{sock.getsockname()[1]}"


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    try:
        import uvloop
    except ImportError:
        return None
    factory: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop
    return factory
