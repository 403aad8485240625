"""The settings of a server, each with its default and its reason, free of torch.

Every limit is a number that somebody, somewhere, has already been attacked or surprised through.
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Literal

from ..core import ConfigError

LOOPBACK_NAMES = ("localhost", "127.0.0.1", "[::1]")


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How much one client may ask for, and for how long it may take to ask.

    Bytes, seconds and counts as the names say. `queue_requests` None means four times what runs at once;
    `queue_tokens` counts the prompt tokens of all accepted requests and so bounds the front's memory. `responses`,
    `response_bytes` and `response_seconds` bound the answers that are kept for /v1/responses, all owners together.
    `file_bytes` and `file_seconds` bound an upload, `files` and `files_bytes` all that are kept, `batches` how many are
    remembered and `batch_lines` what one may ask. `records` and `record_seconds` bound what is kept of requests
    that have ended, for `twofold explain`.
    """

    connections: int = 1024
    headers: int = 100
    header_bytes: int = 32 * 1024
    header_seconds: float = 10.0
    body_bytes: int = 4 * 1024 * 1024
    body_seconds: float = 30.0
    write_seconds: float = 60.0
    keep_alive_seconds: float = 30.0
    queue_requests: int | None = None
    queue_tokens: int = 1 << 20
    prompts: int = 64
    texts: int = 2048
    messages: int = 2048
    responses: int = 4096
    response_bytes: int = 64 * 1024 * 1024
    response_seconds: float = 24 * 3600.0
    file_bytes: int = 200 * 1024 * 1024
    file_seconds: float = 600.0
    files: int = 1000
    files_bytes: int = 4 * 1024 * 1024 * 1024
    batches: int = 1000
    batch_lines: int = 50_000
    records: int = 1000
    record_seconds: float = 3600.0

    def __post_init__(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            if value is not None and value <= 0:
                raise ConfigError(f"limits.{f.name} must be above 0, not {value}")


@dataclass(frozen=True, kw_only=True)
class Watch:
    """When the model's process counts as late, dead or beyond help; seconds.

    It beats four times a second from its own thread. `late`: not ready any more. `dead`: killed and started again.
    `step`: one engine step may take this long. `start`: so may loading. `tries`: deaths in a row before giving up.
    """

    late: float = 1.5
    dead: float = 8.0
    step: float = 300.0
    start: float = 1800.0
    tries: int = 5
    suspects: int = 3
    backoff: float = 0.2

    def __post_init__(self) -> None:
        for f in fields(self):
            if getattr(self, f.name) <= 0:
                raise ConfigError(f"watch.{f.name} must be above 0, not {getattr(self, f.name)}")


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """What `twofold serve` needs to know.

    `api_keys` empty means those of the environment's TWOFOLD_API_KEY (separated by commas), and none without it.
    `allowed_hosts` empty means the loopback names when `host` is a loopback address, and any host otherwise; "*" means
    any. `generation_config` takes the checkpoint's own sampling settings where a request has none, as vLLM does.
    `request_seconds` bounds a request that brings no deadline of its own. `lame_duck_seconds` is how long, at least,
    new requests are told 503 after SIGTERM; `drain_seconds` how long, at most, running ones may take to finish.
    `ping_seconds` of silence in a stream bring a comment line, so that proxies keep the connection.
    """

    model: Path
    host: str = "127.0.0.1"
    port: int = 8000
    served_model_name: str | None = None
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    api_keys_file: Path | None = None
    """More keys, one a line; read again by SIGHUP and POST /reload."""
    config: Path | None = None
    """A TOML file of limits and times over those of the command line; read again by SIGHUP and POST /reload."""
    allowed_hosts: tuple[str, ...] = ()
    enable_ui: bool = True
    runs: Path = Path("runs")
    """Where the training page looks for runs: a directory of what `twofold train` writes, or one run's directory."""
    models: tuple[str, ...] = ()
    """Several models behind one server, NAME=DIR each; a request's `model` chooses, the first is the default."""
    max_resident: int | None = None
    """So many models are in memory at once (default: as many as fit)."""
    idle_seconds: float | None = None
    """A model that nobody has used for so long leaves the memory (default: only when another needs the room)."""
    files_dir: Path | None = None
    """Where uploaded files and batches are kept, over restarts too (default: a private folder that goes at the end)."""
    generation_config: bool = True
    chat_template: Path | None = None
    skip_tokenizer_init: bool = False
    """Serve ids alone (/inference/v1/generate), from a checkpoint that need not have a tokenizer."""
    tool_call_parser: str = "auto"
    """How the model calls tools: auto (by its chat template), none, or a name, as hermes, llama3_json, mistral."""
    reasoning_parser: str = "auto"
    """How the model sets its reasoning apart: auto, none, or a name, as qwen3, deepseek_r1, mistral, granite."""
    lora_modules: tuple[str, ...] = ()
    """Adapters to begin with, each as NAME=DIRECTORY; a request's `model` chooses one."""
    lora_dir: Path | None = None
    """Adapters may be loaded and unloaded while the server runs, from directories below this one."""
    allow_lora_loading: bool = False
    """Clients without a key may do so too, where no keys are set."""
    request_seconds: float = 600.0
    lame_duck_seconds: float = 0.0
    drain_seconds: float = 30.0
    ping_seconds: float = 15.0
    log: Literal["plain", "json"] = "plain"
    timings: bool = False
    """Say in every answer's usage where its time went, also where the request does not ask (its `timings` does)."""
    otlp_traces_endpoint: str | None = None
    """Send a trace of every request there by OTLP, as http://127.0.0.1:4318/v1/traces; needs twofold[otel]."""
    limits: Limits = field(default_factory=Limits)
    watch: Watch = field(default_factory=Watch)

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"port must be from 0 to 65535, not {self.port}")
        for name in ("request_seconds", "ping_seconds"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name} must be above 0, not {getattr(self, name)}")
        for name in ("lame_duck_seconds", "drain_seconds"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} must be 0 or more, not {getattr(self, name)}")
        for name in ("max_resident", "idle_seconds"):
            if (value := getattr(self, name)) is not None and value <= 0:
                raise ConfigError(f"{name} must be above 0, not {value}")
        names = [each.partition("=")[0] for each in self.models]
        if len(set(names)) < len(names) or not all(all(each.partition("=")) for each in self.models):
            raise ConfigError(f"models are NAME=DIR each, every name once, not {' '.join(self.models)}")
        for module in self.lora_modules:
            if not all(module.partition("=")):
                raise ConfigError(f"lora_modules are NAME=DIRECTORY, not {module!r}")
        if self.lora_dir is not None and not self.lora_dir.is_dir():
            raise ConfigError(f"lora_dir {self.lora_dir} is no directory: make it first")
        for key in self.api_keys:
            if len(key) < 8 or not key.isascii() or any(c.isspace() for c in key):
                raise ConfigError("an API key is at least 8 ASCII characters without spaces: choose a longer one")

    def each(self) -> list[ServeConfig]:
        """The settings of each model by itself."""
        parts = [each.partition("=") for each in self.models]
        found = [replace(self, model=Path(path), served_model_name=name, models=()) for name, _, path in parts]
        return [*found[:1], *(replace(one, lora_modules=()) for one in found[1:])] or [self]

    @property
    def name(self) -> str:
        """What `/v1/models` calls the model."""
        return self.served_model_name or self.model.resolve().name

    @property
    def adapters(self) -> tuple[tuple[str, Path], ...]:
        """Names and directories of the adapters to begin with."""
        parts = [module.partition("=") for module in self.lora_modules]
        return tuple((name, Path(path)) for name, _, path in parts)

    @property
    def on_loopback(self) -> bool:
        """Whether only this machine can reach the server."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    @property
    def hosts(self) -> frozenset[str] | None:
        """The names a Host header may carry, or None for any."""
        if "*" in self.allowed_hosts:
            return None
        if self.allowed_hosts:
            return frozenset(h.lower() for h in self.allowed_hosts)
        return frozenset(LOOPBACK_NAMES) if self.on_loopback else None
