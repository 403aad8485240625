"""What was sent to /v1/messages as a chat.

system                     ──▶ a message of the role "system"
text                       ──▶ content
thinking                   ──▶ the reasoning of its message
tool_use                   ──▶ a tool call of its message
tool_result                ──▶ a message of the role "tool", before the rest of its turn
"""

from __future__ import annotations

from typing import Any

import msgspec

from ...core import RequestError
from ..bodies import converted
from ..openai import ChatRequest
from .shapes import Block, CountRequest, MessagesRequest, OutputFormat, Tool, ToolChoice, Turn

Message = dict[str, Any]


def as_chat(asked: CountRequest) -> ChatRequest:
    """The chat that a request asks for.

    Raises:
        RequestError, HttpError: something in it is not done, or wrong; the field is named.
    """
    messages: list[Message] = []
    if asked.system:
        messages.append({"role": "system", "content": _plain(asked.system, "system")})
    for place, turn in enumerate(asked.messages):
        messages += _turn(turn, f"messages[{place}]")
    body: dict[str, Any] = {"model": asked.model, "messages": messages}
    if asked.messages and asked.messages[-1].role == "assistant":  # the client has begun the answer
        body["continue_final_message"] = True
    if asked.tools:
        body["tools"] = [_tool(tool, f"tools[{place}]") for place, tool in enumerate(asked.tools)]
    if asked.tool_choice is not None:
        body |= _choice(asked.tool_choice)
    form = asked.output_format or (asked.output_config.format if asked.output_config else None)
    if form is not None:
        body["response_format"] = _format(form)
    if asked.output_config is not None and asked.output_config.effort is not None:
        body["reasoning_effort"] = asked.output_config.effort
    if asked.thinking is not None and asked.thinking.type != "adaptive":
        body["chat_template_kwargs"] = {"enable_thinking": asked.thinking.type == "enabled"}
    if isinstance(asked, MessagesRequest):
        body |= {
            "max_tokens": asked.max_tokens,
            "stop": asked.stop_sequences,
            "temperature": asked.temperature,
            "top_p": asked.top_p,
            "top_k": asked.top_k,
            "seed": asked.seed,
            "stream": asked.stream,
            "timings": asked.timings,
        }
    return converted(ChatRequest, {name: value for name, value in body.items() if value is not None})


def _turn(turn: Turn, path: str) -> list[Message]:
    if turn.role not in ("user", "assistant"):
        raise RequestError(f"role is user or assistant, not {turn.role!r:.40}", f"{path}.role")
    if isinstance(turn.content, str):
        return [{"role": turn.role, "content": turn.content}]
    results: list[Message] = []
    texts, thoughts, calls = list[str](), list[str](), list[Any]()
    for place, block in enumerate(turn.content):
        at = f"{path}.content[{place}]"
        if block.type == "text":
            texts.append(_need(block.text, "text", at))
        elif block.type == "thinking" and turn.role == "assistant":
            thoughts.append(_need(block.thinking, "thinking", at))
        elif block.type == "tool_use" and turn.role == "assistant":
            calls.append(_call(block, at))
        elif block.type == "tool_result" and turn.role == "user":
            name, content = _need(block.tool_use_id, "tool_use_id", at), _plain(block.content or "", f"{at}.content")
            results.append({"role": "tool", "tool_call_id": name, "content": content})
        else:
            raise RequestError(
                f"a block of type {block.type!r:.40} is not done here by this version: send text", f"{at}.type"
            )
    message: Message = {"role": turn.role, "content": "\n".join(texts)}
    if thoughts:
        message["reasoning_content"] = "\n".join(thoughts)
    if calls:
        message["tool_calls"] = calls
    return results if results and not texts else [*results, message]


def _call(block: Block, at: str) -> dict[str, Any]:
    arguments = msgspec.json.encode(block.input or {}).decode()
    function = {"name": _need(block.name, "name", at), "arguments": arguments}
    return {"id": _need(block.id, "id", at), "type": "function", "function": function}


def _need(value: str | None, name: str, at: str) -> str:
    if value is None:
        raise RequestError(f"a block of this type has {name}", f"{at}.{name}")
    return value


def _plain(content: str | list[Block], path: str) -> str:
    """Text blocks as one text."""
    if isinstance(content, str):
        return content
    texts = []
    for place, block in enumerate(content):
        if block.type != "text" or block.text is None:
            raise RequestError(f"a block of type {block.type!r:.40} is not done: send text", f"{path}[{place}].type")
        texts.append(block.text)
    return "\n".join(texts)


def _tool(tool: Tool, path: str) -> dict[str, Any]:
    if tool.type not in (None, "custom"):
        raise RequestError(f"a tool of type {tool.type!r:.60} is not done: only your own are", f"{path}.type")
    if tool.input_schema is None:
        raise RequestError("a tool has an input_schema", f"{path}.input_schema")
    function = {"name": tool.name, "parameters": tool.input_schema}
    more = {"description": tool.description, "strict": tool.strict}
    return {"type": "function", "function": function | {k: v for k, v in more.items() if v is not None}}


def _choice(choice: ToolChoice) -> dict[str, Any]:
    if (choice.type == "tool") != (choice.name is not None):
        raise RequestError('tool_choice has a name with type "tool" and with no other', "tool_choice.name")
    found: dict[str, Any] = {"tool_choice": "required" if choice.type == "any" else choice.type}
    if choice.type == "tool":
        found["tool_choice"] = {"type": "function", "function": {"name": choice.name}}
    if choice.disable_parallel_tool_use:
        found["parallel_tool_calls"] = False
    return found


def _format(form: OutputFormat) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": form.schema, "strict": True}}
