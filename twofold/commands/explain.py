"""`twofold explain`: where a request's time went and why it waited, as the server that answered it remembers."""

from __future__ import annotations

import json
import time
import urllib.parse
from typing import Any

from ..engine.facts import REASONS
from .remote import Server

WIDTH = 40
PARTS = (
    ("front", "read, checked, made into tokens"),
    ("queue", "waiting for its turn"),
    ("prefill", "reading the prompt"),
    ("decode", "writing the answer"),
)
WHY = {
    **REASONS,
    "restart": "the model's process had died, and another had to take over",
    "compile": "its grammar was compiled before it was accepted",
}


def explain(url: str, key: str | None, name: str | None, *, as_json: bool = False) -> int:
    """Print one request's facts, or the last requests; exit code 0.

    Raises:
        RequestError: the server does not know it; the message names the nearest.
        ConfigError, TwofoldError: there is no such server.
    """
    server = Server(url, key, "--url")
    path = "requests?limit=20" if name is None else f"requests/{urllib.parse.quote(name, safe='')}"
    with server.asked(path, below="") as answer:
        found = json.loads(answer.read())
        if as_json:
            told = json.dumps(found, indent=2)
        elif name is None:
            told = "\n".join(line(one) for one in found["data"]) or "no request yet"
        else:
            told = "\n".join(story(found))
    print(told)
    return 0


def line(facts: dict[str, Any]) -> str:
    """One request of the list."""
    when = time.strftime("%H:%M:%S", time.localtime(facts["created_at"]))
    tokens = f"{facts['prompt_tokens']} + {facts['output_tokens']} tokens"
    return f"{when}  {facts['id']:<24} {outcome(facts):<26} {spent(facts['timings']['total_seconds']):>8}  {tokens}"


def outcome(facts: dict[str, Any]) -> str:
    if facts["state"] != "finished":
        return str(facts["state"])
    words = ", ".join(facts["finish_reasons"]) or facts.get("error") or ""
    return f"{facts['status']}{f' ({words})' if words else ''}"


def story(facts: dict[str, Any]) -> list[str]:
    """The whole account, line by line."""
    times = facts["timings"]
    model = facts["model"] + (f" with adapter {facts['adapter']}" if facts["adapter"] else "")
    how = ", streamed" if facts["stream"] else ""
    lines = [
        f"{facts['id']}: {outcome(facts)}, {spent(times['total_seconds'])}",
        f"{facts['path']}{how}, by {model}, {time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(facts['created_at']))}",
    ]
    if facts["trace_id"]:
        lines.append(f"trace {facts['trace_id']}")
    return [*lines, "", *bars(times), "", *reasons(facts), "", f"sampling: {asked(facts['settings'])}"]


def bars(times: dict[str, Any]) -> list[str]:
    """The four parts on one line of time, each where it lies."""
    total = times["total_seconds"] or 1e-9
    lines, before = [], 0.0
    for name, words in PARTS:
        seconds = times[f"{name}_seconds"]
        start, end = round(WIDTH * before / total), round(WIDTH * (before + seconds) / total)
        before += seconds
        shown = max(end - start, 1 if seconds > 0 else 0)
        start = min(start, WIDTH - shown)
        bar = (" " * start + "█" * shown).ljust(WIDTH)
        lines.append(f"{name:<8}│{bar}│ {spent(seconds):>8} {100 * seconds / total:3.0f}%  {words}")
    return lines


def reasons(facts: dict[str, Any]) -> list[str]:
    """Tokens, and in words what held it up."""
    times, said = facts["timings"], facts["output_tokens"]
    cached = f", {times['cached_tokens']} of them found in the cache" if times["cached_tokens"] else ""
    tiers = ", ".join(f"{count} in the {tier} tier" for tier, count in times["cached_tiers"].items())
    cached += f" ({tiers})" if tiers else ""
    lines = [f"tokens: {facts['prompt_tokens']} in the prompt{cached}; {said} written"]
    if times["tokens_per_second"]:
        lines[0] += f", {times['tokens_per_second']:.1f} a second"
    if times["first_token_seconds"] is not None:
        lines.append(f"first token after {spent(times['first_token_seconds'])}")
    if facts["status"] == 429:
        lines.append("refused: the queue was full")
    for reason, seconds in sorted(times["waits"].items(), key=lambda pair: -pair[1]):
        lines.append(f"waited {spent(seconds)}: {WHY.get(reason, reason)}")
    if not times["waits"] and facts["status"] != 429:
        lines.append("it waited for nothing but the step that was under way")
    if times["preemptions"]:
        lines.append(f"preempted {many(times['preemptions'])}: the cache was full, and others had more work done")
    if times["restarts"]:
        lines.append(f"the model's process died under it {many(times['restarts'])}; its text went on where it was")
    if times["drafted_tokens"]:
        share = times["accepted_tokens"] / times["drafted_tokens"]
        lines.append(
            f"guessed ahead: {times['accepted_tokens']} of {times['drafted_tokens']} tokens right ({share:.0%})"
        )
    if len(facts["sequences"]) > 1:
        each = ", ".join(f"{one['output_tokens']} ({one['finish_reason'] or '…'})" for one in facts["sequences"])
        lines.append(f"{len(facts['sequences'])} sequences, their tokens: {each}")
    return lines


def asked(settings: dict[str, Any]) -> str:
    """The settings without texts: lists are told by their length."""
    told = [f"{name} {value}" for name, value in settings.items() if value is not None]
    return ", ".join(told) or "as the server's defaults have it"


def many(count: int) -> str:
    return {1: "once", 2: "twice"}.get(count, f"{count} times")


def spent(seconds: float) -> str:
    return f"{1000 * seconds:.1f} ms" if seconds < 1 else f"{seconds:.2f} s"
