"""Reward functions that go wrong, each in its own way; and a tool."""

from __future__ import annotations

import math
import os
import time


def raises(completions, **given):
    raise ValueError("I do not like this batch")


def hangs(completions, **given):
    time.sleep(600)


def hangs_on_rank_1(completions, **given):
    if os.environ["RANK"] == "1":
        time.sleep(600)
    return [1.0] * len(completions)


def not_a_number(completions, **given):
    return [math.nan] * len(completions)


def some(completions, **given):
    return [None if number % 3 == 0 else float(len(text) % 5) for number, text in enumerate(completions)]


def tool(prompt, messages):
    return "[tool]" if len(messages) < 3 else None
