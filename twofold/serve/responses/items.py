"""What was sent to /v1/responses as a chat: items become messages, and the answer's items become messages again.

message                ──▶ a message of its role
reasoning              ──▶ the reasoning of the assistant's message that follows
function_call          ──▶ tool calls of one assistant's message, together with the text before them
function_call_output   ──▶ a message of the role "tool"
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Any

import msgspec

from ...core import RequestError
from ..bodies import converted
from ..openai import ChatRequest
from .shapes import Item, OutputItem, OutputMessage, Reasoning, ResponseRequest

Message = dict[str, Any]

TEXTS = ("input_text", "output_text", "text")


def as_chat(asked: ResponseRequest, history: Sequence[Message]) -> ChatRequest:
    """The chat that a request asks for, `history` being what was said before its input.

    Raises:
        RequestError, HttpError: something in it is not done, or wrong; the field is named.
    """
    messages = list(history)
    if asked.instructions is not None:
        messages.insert(0, {"role": "system", "content": asked.instructions})
    body: dict[str, Any] = {
        "model": asked.model,
        "messages": messages,
        "max_completion_tokens": asked.max_output_tokens,
        "stream": asked.stream,
    }
    names = ("temperature", "top_p", "top_k", "min_p", "seed", "stop", "ignore_eos", "priority", "cache_salt")
    for name in (*names, "chat_template_kwargs", "parallel_tool_calls", "timings"):
        body[name] = getattr(asked, name)
    if asked.wants_logprobs:
        body |= {"logprobs": True, "top_logprobs": asked.top_logprobs}
    if asked.text is not None:
        body |= _text(asked)
    if asked.reasoning is not None:
        body["reasoning_effort"] = asked.reasoning.effort
    if asked.tools:
        body |= _tools(asked)
    return converted(ChatRequest, {name: value for name, value in body.items() if value is not None})


def _text(asked: ResponseRequest) -> dict[str, Any]:
    text = asked.text
    assert text is not None
    found: dict[str, Any] = {"verbosity": text.verbosity}
    form = text.format
    if form is None or form.type == "text":
        return found
    if form.type == "json_object":
        return found | {"response_format": {"type": "json_object"}}
    if not form.name or form.schema is None:
        raise RequestError("a json_schema format has a name and a schema", "text.format")
    schema = {"name": form.name, "schema": form.schema, "strict": form.strict, "description": form.description}
    inner = {name: value for name, value in schema.items() if value is not None}
    return found | {"response_format": {"type": "json_schema", "json_schema": inner}}


def _tools(asked: ResponseRequest) -> dict[str, Any]:
    tools = []
    for place, tool in enumerate(asked.tools or ()):
        if tool.get("type") != "function":
            raise RequestError(
                f"a tool of type {tool.get('type')!r:.40} is not done: only functions are", f"tools[{place}].type"
            )
        tools.append({"type": "function", "function": {k: v for k, v in tool.items() if k != "type"}})
    choice = asked.tool_choice
    if isinstance(choice, dict):
        choice, tools = _choice(choice, tools)
    return {"tools": tools, "tool_choice": choice}


def _choice(choice: dict[str, Any], tools: list[Any]) -> tuple[str | dict[str, Any], list[Any]]:
    kind, name = choice.get("type"), choice.get("name")
    if kind == "function" and isinstance(name, str):
        return {"type": "function", "function": {"name": name}}, tools
    allowed = choice.get("tools")
    if kind == "allowed_tools" and choice.get("mode") in ("auto", "required") and isinstance(allowed, list):
        names = [tool.get("name") for tool in allowed if isinstance(tool, dict)]
        return str(choice["mode"]), [tool for tool in tools if tool["function"].get("name") in names]
    raise RequestError("tool_choice is auto, none, required, one function by its name, or allowed_tools", "tool_choice")


# -- items to messages -------------------------------------------------------------------------------------------------


def given(asked: ResponseRequest) -> list[dict[str, Any]]:
    """The input as plain items, each with an id: what /input_items lists."""
    items = asked.input
    if items is None:
        items = []
    if isinstance(items, str):
        items = [Item(type="message", role="user", content=[{"type": "input_text", "text": items}])]
    found = []
    for item in items:
        item.type = item.type or "message"
        if isinstance(item.content, str) and item.type == "message":
            kind = "output_text" if item.role == "assistant" else "input_text"
            item.content = [{"type": kind, "text": item.content}]
        item.id = item.id or f"{_PREFIX.get(item.type, 'item')}_{secrets.token_hex(12)}"
        found.append({k: v for k, v in msgspec.to_builtins(item).items() if v is not None})
    return found


_PREFIX = {"message": "msg", "function_call": "fc", "function_call_output": "fco", "reasoning": "rs"}


def messages(items: Sequence[dict[str, Any]]) -> list[Message]:
    """Items as a chat's messages; raises RequestError that names the item at fault."""
    found: list[Message] = []
    reasoning = ""
    for place, item in enumerate(items):
        path, kind = f"input[{place}]", item.get("type")
        if kind == "reasoning":
            reasoning += _text_of(item.get("content") or item.get("summary") or [], path, any_kind=True)
        elif kind == "function_call":
            _add_call(found, item, path, reasoning)
            reasoning = ""
        elif kind == "function_call_output":
            name, output = item.get("call_id"), item.get("output")
            if not name or output is None:
                raise RequestError("a function_call_output has call_id and output", path)
            text = output if isinstance(output, str) else _text_of(output, f"{path}.output")
            found.append({"role": "tool", "tool_call_id": name, "content": text})
        elif kind == "message":
            message = {"role": item.get("role") or "user", "content": _text_of(item.get("content") or [], path)}
            if reasoning and message["role"] == "assistant":
                message["reasoning_content"], reasoning = reasoning, ""
            found.append(message)
        else:
            raise RequestError(f"an item of type {kind!r:.40} is not done by this version", f"{path}.type")
    return found


def answered(output: Sequence[OutputItem]) -> list[Message]:
    """An answer's items as the messages that the next turn starts from."""
    plain = []
    for item in output:
        each = msgspec.to_builtins(item)
        if isinstance(item, OutputMessage | Reasoning):
            each["content"] = [{"type": part["type"], "text": part["text"]} for part in each["content"]]
        plain.append(each)
    return messages(plain)


def _add_call(found: list[Message], item: dict[str, Any], path: str, reasoning: str) -> None:
    name, call_id = item.get("name"), item.get("call_id")
    if not name or not call_id or item.get("arguments") is None:
        raise RequestError("a function_call has call_id, name and arguments", path)
    call = {"id": call_id, "type": "function", "function": {"name": name, "arguments": item["arguments"]}}
    if not found or found[-1]["role"] != "assistant":
        found.append({"role": "assistant", "content": ""})
    if reasoning:
        found[-1]["reasoning_content"] = found[-1].get("reasoning_content", "") + reasoning
    found[-1].setdefault("tool_calls", []).append(call)


def _text_of(parts: Any, path: str, *, any_kind: bool = False) -> str:
    if isinstance(parts, str):
        return parts
    texts = []
    for number, part in enumerate(parts):
        kind, text = part.get("type"), part.get("text")
        if kind == "refusal":
            text = part.get("refusal")
        elif not any_kind and kind not in TEXTS:
            raise RequestError(
                f"content of type {kind!r:.40} is not done by this version: send text", f"{path}.content[{number}].type"
            )
        if not isinstance(text, str):
            raise RequestError("a part of text has its text", f"{path}.content[{number}].text")
        texts.append(text)
    return "\n".join(texts)
