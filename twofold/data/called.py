"""Messages with calls, in the way in which one template reads them: the other direction of `speech/`.

Clients send arguments as text; most templates want the object and write its JSON themselves, some join the text. Where
a message only calls, some look whether its content is none, some whether it is empty. Some take call ids of nine
letters and digits alone. What a template wants is found once, by rendering a call that is known.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from ..core import RequestError
from .rows import Message
from .sandbox import RenderLimits, compile_template, render_template

if TYPE_CHECKING:
    from .chat import ChatTemplate

_SHORT = "probeid09"
_LONG = "call_" + 4 * _SHORT


@dataclass(frozen=True)
class Wants:
    """How a template wants calls: arguments as objects, the content of a message that only calls, ids of nine."""

    objects: bool = True
    empty: str | None = ""
    short_ids: bool = False


def fitted(template: ChatTemplate, messages: Sequence[Message], *, tools: bool) -> list[Message]:
    """Messages as the template wants them; those without calls are as they were.

    Arguments that are no JSON object stay text. A tool's answer gets the name of the function that was called.
    """
    if not any(message.get("tool_calls") or "tool_call_id" in message for message in messages):
        return list(messages)
    source = template.named.get("tool_use", template.source) if tools else template.source
    wants = _wants(source, tuple(template.special.items()), template.limits)
    names: dict[str, str] = {}
    found: list[Message] = []
    for message in messages:
        if message.get("tool_calls"):
            calls = [_call(call, wants) for call in message["tool_calls"]]
            names |= {str(given["id"]): call["function"]["name"] for given, call in zip(message["tool_calls"], calls)}
            found.append({**message, "content": message.get("content") or wants.empty, "tool_calls": calls})
        elif "tool_call_id" in message:
            given = message["tool_call_id"]
            name = {"name": names[given]} if given in names and "name" not in message else {}
            found.append({**message, **name, "tool_call_id": _short(given) if wants.short_ids else given})
        else:
            found.append(message)
    return found


def _call(call: Mapping[str, Any], wants: Wants) -> dict[str, Any]:
    function = call["function"]
    arguments = function["arguments"]
    if wants.objects:
        arguments = _object(arguments)
    elif not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    identity = _short(call["id"]) if wants.short_ids else call["id"]
    return {"id": identity, "type": "function", "function": {"name": function["name"], "arguments": arguments}}


def _object(arguments: Any) -> Any:
    if not isinstance(arguments, str):
        return arguments
    try:
        found = json.loads(arguments or "{}")
    except (ValueError, RecursionError):
        return arguments
    return found if isinstance(found, dict) else arguments


def _short(identity: str) -> str:
    """Nine letters and digits, the same ones for the same id."""
    if len(identity) == 9 and identity.isascii() and identity.isalnum():
        return identity
    return hashlib.blake2b(identity.encode("utf-8", "replace"), digest_size=5).hexdigest()[:9]


@lru_cache(maxsize=64)
def _wants(source: str, special: tuple[tuple[str, str], ...], limits: RenderLimits) -> Wants:
    template = compile_template(source)
    for short, objects, empty in itertools.product((False, True), (True, False), (None, "")):
        wants = Wants(objects, empty, short)
        values = {**dict(special), "messages": _probe(wants), "add_generation_prompt": True}
        try:
            text = render_template(template, values, limits)
        except RequestError:
            continue
        written = "probename" in text and "probevalue" in text and "None" not in text
        if written and not any(wrong in text for wrong in ("'probekey'", '\\"probekey')):
            return wants
    return Wants()


def _probe(wants: Wants) -> list[Message]:
    arguments = {"probekey": "probevalue"}
    identity = _SHORT if wants.short_ids else _LONG
    function = {"name": "probename", "arguments": arguments if wants.objects else json.dumps(arguments)}
    return [
        {"role": "user", "content": "q"},
        {
            "role": "assistant",
            "content": wants.empty,
            "tool_calls": [{"id": identity, "type": "function", "function": function}],
        },
        {"role": "tool", "tool_call_id": identity, "name": "probename", "content": "a"},
    ]
