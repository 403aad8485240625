"""What is asked of a policy, and what came of it: a prompt, a rollout of it, a group of them. Free of torch.

prompt.ids │ ids[0]  ids[1]  ids[2] │ ids[3]  ids[4] │ ids[5] ...
mine       │  yes     yes     yes   │   no      no   │  yes          a tool said ids[3] and ids[4]
logprobs   │ -0.31   -2.07   -0.00  │  0.0     0.0   │ -1.12
versions   │   7       7       7    │   7       7    │   8           new weights came while it ran
"""

from __future__ import annotations

from dataclasses import dataclass

from ..data.prompts import Prompt

__all__ = ["Group", "Prompt", "Rollout"]


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
