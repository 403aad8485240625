"""Every error a user can meet: what was given, what is allowed, what to do next.

TwofoldError
├── ConfigError       a setting, flag or recipe key is wrong            exit code 2
├── RequestError      one request is malformed; `param` is its path     HTTP 400
├── CheckpointError   a model directory cannot be read as it stands     exit code 2
├── CapacityError     it does not fit, and the message says what would  exit code 2, HTTP 429 or 503
├── StateError        a state machine was asked for an illegal move     a bug in Twofold
└── WorkerError       the model's process is gone or does not answer    HTTP 503
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class TwofoldError(Exception):
    """Base of all errors that Twofold raises on purpose."""


class ConfigError(TwofoldError):
    """A setting that cannot be: unknown key, wrong type, or an impossible value."""


class RequestError(TwofoldError):
    """A request that cannot be served; `param` is the path of the field at fault."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class CheckpointError(TwofoldError):
    """A checkpoint with a missing, left-over, damaged or unknown part, named in the message."""


class CapacityError(TwofoldError):
    """Something that does not fit the machine or the queue; the message says what would."""


class StateError(TwofoldError):
    """An illegal transition of a state machine."""


class WorkerError(TwofoldError):
    """The process that holds the model is gone."""


def nearest(name: str, choices: Iterable[str]) -> str | None:
    """The choice that a mistyped `name` most likely meant, or None when nothing is close."""
    found = difflib.get_close_matches(name, list(choices), n=1, cutoff=0.5)
    return found[0] if found else None


def unknown(kind: str, name: str, choices: Iterable[str]) -> str:
    """The one line for a name that nobody knows: what was given, the nearest name, the choices."""
    known = sorted(choices)
    guess = nearest(name, known)
    hint = f"did you mean '{guess}'?" if guess else f"choose from: {', '.join(known)}"
    return f"unknown {kind} '{name}': {hint}"
