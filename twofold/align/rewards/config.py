"""RewardConfig: one table of `[[rewards]]`. Every kind has its own fields, and a field of another kind is an error."""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass, field
from typing import Any, Literal
from urllib.parse import urlsplit

from ...core import ConfigError, unknown
from ...data.schema import check_schema

_ALL = ("kind", "name", "weight", "timeout", "start")
FIELDS: dict[str, tuple[str, ...]] = {
    "function": ("path", "interface", "answer"),
    "http": ("url", "protocol", "retries", "token", "answer"),
    "model": ("model",),
    "python_parses": ("prefix",),
    "python_passes_tests": ("tests", "entry", "prefix", "partial", "seconds", "megabytes"),
    "regex": ("pattern", "whole", "seconds"),
    "json_schema": ("schema", "seconds"),
    "length": ("least", "most", "slack", "unit"),
    "equals": ("answer", "pattern", "compare", "seconds"),
}
_NEEDED = {"function": "path", "http": "url", "model": "model", "regex": "pattern", "json_schema": "schema"}


@dataclass(frozen=True, kw_only=True)
class RewardConfig:
    """One judge of completions; the total is the sum of weight times value over those that gave one."""

    kind: str
    """function, http, model, python_parses, python_passes_tests, regex, json_schema, length or equals."""
    name: str = ""
    """What the journal calls it; the kind, where nothing is given."""
    weight: float = 1.0
    """Its value is multiplied by this in the total; 0.0 shows it without counting it."""
    timeout: float = 60.0
    """Seconds for one batch: a process that takes longer is killed, and its values are missing."""
    start: float = 120.0
    """Seconds for its process to start and to import what it needs."""

    path: str = ""
    """function: `path/to/file.py:name` or `package.module:name`."""
    interface: Literal["trl", "verl", "openrlhf"] = "trl"
    """function: whose arguments it takes."""
    url: str = ""
    """http: where batches are posted; http or https."""
    protocol: Literal["json", "openrlhf"] = "json"
    """http: the shape of what is posted."""
    retries: int = 3
    """http: attempts after the first, when there was no answer or one of 429 and 500 to 599."""
    token: str = ""
    """http: name of the environment variable that holds a bearer token."""
    model: str = ""
    """model: which of the run's reward models."""
    prefix: bool = False
    """python_*: the prompt is the beginning of the code."""
    tests: str = "tests"
    """python_passes_tests: column of a row's tests."""
    entry: str = "entry_point"
    """python_passes_tests: column of the function's name, for tests that are a `check(candidate)`."""
    partial: bool = True
    """python_passes_tests: the share of tests that pass; otherwise 1.0 for all and 0.0 for less."""
    seconds: float = 5.0
    """Limit for one completion, where the kind has one."""
    megabytes: int = 512
    """python_passes_tests: address space of one candidate."""
    pattern: str = ""
    """regex: what must be found. equals: where the answer stands in a completion (its first group)."""
    whole: bool = False
    """regex: the pattern must cover the whole completion."""
    schema: dict[str, Any] = field(default_factory=dict)
    """json_schema: what the JSON of a completion must be."""
    least: int = 0
    """length: shorter ones lose."""
    most: int = 0
    """length: longer ones lose; 0 is no limit."""
    slack: int = 0
    """length: the value falls from 1.0 to 0.0 over this many; 0 is at once."""
    unit: Literal["tokens", "words", "characters"] = "tokens"
    """length: what is counted."""
    answer: str = "answer"
    """equals: column of the right answer. function and http in OpenRLHF's shape: column of the labels."""
    compare: Literal["text", "exact", "number"] = "text"
    """equals: text ignores case and blanks, exact ignores nothing, number compares 1,000 and 1000.0 as numbers."""

    def __post_init__(self) -> None:
        if self.kind not in FIELDS:
            raise ConfigError(unknown("kind of reward", self.kind, FIELDS))
        object.__setattr__(self, "name", self.name or self.kind)
        allowed = _ALL + FIELDS[self.kind]
        for f in dataclasses.fields(self):
            standard = f.default if f.default is not dataclasses.MISSING else {}
            if f.name not in allowed and getattr(self, f.name) != standard:
                raise ConfigError(f"reward '{self.name}': " + unknown(f"field of kind '{self.kind}'", f.name, allowed))
        needed = _NEEDED.get(self.kind)
        if needed and not getattr(self, needed):
            raise ConfigError(f"reward '{self.name}' of kind '{self.kind}' needs '{needed}'")
        self._check_numbers()
        self._check_kind()

    def _check_numbers(self) -> None:
        if not math.isfinite(self.weight):
            raise ConfigError(f"reward '{self.name}': 'weight' must be a finite number, not {self.weight}")
        for name in ("timeout", "start", "seconds", "megabytes"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ConfigError(f"reward '{self.name}': '{name}' must be above 0, not {value}")
        for name in ("retries", "least", "most", "slack"):
            if getattr(self, name) < 0:
                raise ConfigError(f"reward '{self.name}': '{name}' must be at least 0, not {getattr(self, name)}")
        if 0 < self.most < self.least:
            raise ConfigError(f"reward '{self.name}': 'most' ({self.most}) is below 'least' ({self.least})")

    def _check_kind(self) -> None:
        if self.kind == "function" and not all(self.path.rpartition(":")[::2]):
            example = "'rewards.py:score' or 'package.module:score'"
            raise ConfigError(f"reward '{self.name}': 'path' is '{self.path}', not such as {example}")
        if self.kind == "http":
            parts = urlsplit(self.url)
            if parts.scheme not in ("http", "https") or not parts.hostname:
                raise ConfigError(f"reward '{self.name}': 'url' is '{self.url}', not an http or https address")
        if self.pattern:
            try:
                groups = re.compile(self.pattern).groups
            except re.error as error:
                raise ConfigError(f"reward '{self.name}': 'pattern' is no regular expression: {error}") from None
            if self.kind == "equals" and groups < 1:
                raise ConfigError(f"reward '{self.name}': 'pattern' needs a group around the answer, such as (.*)")
        if self.kind == "json_schema":
            try:
                check_schema(self.schema)
            except ValueError as error:
                raise ConfigError(f"reward '{self.name}': {error}") from None
        if self.kind == "length" and not (self.least or self.most):
            raise ConfigError(f"reward '{self.name}' of kind 'length' needs 'least' or 'most'")


def check_names(rewards: tuple[RewardConfig, ...]) -> None:
    """Two rewards of one name would share a line of the journal. Raises ConfigError naming it."""
    names = [reward.name for reward in rewards]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice:
        raise ConfigError(f"two rewards are called '{twice}': give one of them another 'name'")
