"""What is asked of a policy, and what came of it: a prompt, a rollout of it, a group of them. Free of torch.

prompt.ids │ ids[0]  ids[1]  ids[2] │ ids[3]  ids[4] │ ids[5] ...
mine       │  yes     yes     yes   │   no      no   │  yes          a tool said ids[3] and ids[4]
logprobs   │ -0.31   -2.07   -0.00  │  0.0     0.0   │ -1.12
versions   │   7       7       7    │   7       7    │   8           new weights came while it ran
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """What a policy is to answer: ids as the model reads them, and the row of the data that they come from."""

    number: int
    """Its place in its source; the seeds of its samples hang on it."""
    ids: tuple[int, ...]
    shown: str | list[dict[str, Any]] = ""
    """What the data said: a text, or a chat's messages."""
    columns: Mapping[str, Any] = field(default_factory=dict)
    """The row's other keys, for rewards."""


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """One sample behind a prompt: every token with who made it, by which weights, and how likely it was then."""

    prompt: Prompt
    sample: int
    ids: tuple[int, ...]
    """Everything behind the prompt."""
    logprobs: tuple[float, ...]
    """In nats, fp32 values, of the distribution sampled from; 0.0 where the token is not the model's."""
    mine: tuple[bool, ...]
    """Whether the model made the token; False: a tool said it."""
    versions: tuple[int, ...]
    """The version of the weights that made each token."""
    finish: str
    """ One of "stop", "length", "error", "abort", "timeout"."""
    text: str
    """The text behind the prompt, without a stop string and special tokens unless they were asked for."""
    error: str | None = None
    """Why the engine could not go on, where finish is "error"."""


@dataclass(frozen=True, kw_only=True)
class Group:
    """All samples of one prompt, in the order of their numbers."""

    prompt: Prompt
    rollouts: tuple[Rollout, ...]
