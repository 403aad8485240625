"""A task file: prompts, what judges the answers, and what counts as passing. Free of torch.

    prompts = "tests.jsonl"          # {"prompt": "def add(a, b):\n", "tests": ["assert add(1, 2) == 3"]} a line
    success = 1.0
    k = [1, 4, 8]
    max_tokens = 64

    [[rewards]]                      # as in the recipes of `twofold align`
    kind = "python_passes_tests"
    prefix = true                    # the prompt is the code's beginning
    partial = false                  # all of the tests, or nothing

A line's prompt is a text or a list of messages; its other keys are columns, which the rewards are given.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..core import ConfigError, load_config
from ..data import SOURCES, Document, documents
from ..data.prompts import asked, question
from ..data.rows import Said
from .episode import Prompt
from .rewards.config import RewardConfig, check_names


@dataclass(frozen=True, kw_only=True)
class Task:
    """What `twofold evaluate` asks of a model, and how it judges the answers.

    Raises:
        ConfigError: nothing to judge by, or numbers that cannot be.
    """

    prompts: str
    """A JSONL file (its path from the task file, or from here) or a named source of questions with answers."""
    rewards: tuple[RewardConfig, ...]
    """What judges an answer, as in the recipes of alignment."""
    name: str = ""
    """What the figures are known by; left out, the task file's name."""
    success: float = 1.0
    """The total reward from which an answer counts as passing."""
    k: tuple[int, ...] = (1,)
    """Of how many sampled answers one has to pass: a pass@k for each."""
    samples: int | None = None
    """Sampled answers to a prompt; 0: the greedy one alone; left out, the largest k."""
    temperature: float = 1.0
    """Of the sampled answers."""
    top_p: float = 1.0
    """Of the sampled answers: the likeliest tokens that together have this share."""
    max_tokens: int = 128
    """The longest answer."""
    stop: tuple[str, ...] = ()
    """Texts that end an answer, and are not part of it."""
    chat: bool = False
    """Whether a text prompt is what a user says; prompts that are messages always chat."""
    system: str = ""
    """What the model is told first, where it chats."""
    seed: int = 0
    """Of the sampled answers and of the intervals."""

    def __post_init__(self) -> None:
        if not self.rewards:
            raise ConfigError("a task needs something to judge by: at least one [[rewards]] table")
        check_names(self.rewards)
        if not self.k or min(self.k) < 1:
            raise ConfigError(f"k must be numbers of answers from 1, such as [1, 8], not {list(self.k)}")
        if self.samples is not None and self.samples != 0 and self.samples < max(self.k):
            raise ConfigError(
                f"samples is {self.samples}, less than the largest k, {max(self.k)}: draw more, or ask for less"
            )
        if self.max_tokens < 1:
            raise ConfigError(f"max_tokens must be 1 or more, not {self.max_tokens}")
        if not 0.0 < self.temperature <= 2.0:
            raise ConfigError(f"temperature must be in (0, 2], not {self.temperature}: greedy answers come besides")
        if not 0.0 < self.top_p <= 1.0:
            raise ConfigError(f"top_p must be in (0, 1], not {self.top_p}")

    @property
    def drawn(self) -> int:
        """Sampled answers to a prompt."""
        return max(self.k) if self.samples is None else self.samples


def read_task(path: Path, overrides: Mapping[str, Any] | None = None) -> Task:
    """The task of a TOML file, its prompts' path made one from here.

    Raises:
        ConfigError: no such file, or a key that is unknown or cannot be.
    """
    task = load_config(Task, path, overrides)
    beside = path.parent / task.prompts
    given = overrides is not None and "prompts" in overrides
    found = str(beside) if not given and task.prompts not in SOURCES and beside.is_file() else task.prompts
    return replace(task, name=task.name or path.stem, prompts=found)


def read_prompts(task: Task, limit: int | None = None) -> list[Prompt]:
    """The task's prompts as the data shows them, the first `limit` of them; nothing is tokenized yet.

    Raises:
        ConfigError: no such source, a bad line, which is named, or no prompt at all.
    """
    found = []
    rows = documents(task.prompts) if task.prompts in SOURCES else documents(task.prompts, asked)
    for number, document in enumerate(itertools.islice(rows, limit)):
        shown, columns = _question(document, task.prompts)
        found.append(Prompt(number=number, ids=(), shown=_talk(task, shown), columns=columns))
    if not found:
        raise ConfigError(f"{task.prompts} has no prompt in it")
    return found


def fingerprint(prompts: Sequence[Prompt]) -> str:
    """A short hash of what was asked and what it is judged by: equal figures' names do not make equal tasks."""
    plain = [[prompt.shown, dict(prompt.columns)] for prompt in prompts]
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:16]


def _question(document: Document, source: str) -> tuple[Said, Mapping[str, Any]]:
    """What a document asks, and its columns; an answer that it has is the column "answer"."""
    content = question(document, source)
    if content.tools:
        raise ConfigError(f"{document.where or source}: a task's prompts have no tools")
    return content.prompt, content.columns


def _talk(task: Task, shown: Said) -> str | list[dict[str, Any]]:
    """The prompt as it is asked: messages where the task chats."""
    if isinstance(shown, str) and not task.chat:
        return shown
    messages = [{"role": "user", "content": shown}] if isinstance(shown, str) else [dict(each) for each in shown]
    told = bool(task.system) and messages[0]["role"] != "system"
    return [{"role": "system", "content": task.system}, *messages] if told else messages
