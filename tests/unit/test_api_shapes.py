"""Reasoning, text and calls as the items of Responses and the blocks of Messages; and both as chats again."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from openai.types.responses import Response as OpenAIResponse
from openai.types.responses import ResponseStreamEvent
from pydantic import TypeAdapter

from twofold.core import RequestError
from twofold.serve.answers import CompletionTokensDetails, PromptTokensDetails, Usage
from twofold.serve.anthropic import blocks
from twofold.serve.anthropic.events import Blocks
from twofold.serve.anthropic.shapes import Answer, MessagesRequest, MessagesUsage
from twofold.serve.bodies import decode
from twofold.serve.errors import HttpError
from twofold.serve.responses import items
from twofold.serve.responses.builder import Builder
from twofold.serve.responses.shapes import Response, ResponseRequest
from twofold.serve.said import CallDelta, Step

USAGE = Usage(10, 7, 17, PromptTokensDetails(4), CompletionTokensDetails(3))
STEPS = [
    Step(reasoning="let me "),
    Step(reasoning="see"),
    Step(text="I will "),
    Step(text="look."),
    Step(calls=[CallDelta(0, "call_a", "find")]),
    Step(calls=[CallDelta(0, arguments='{"q":')]),
    Step(calls=[CallDelta(0, arguments=' "x"}'), CallDelta(1, "call_b", "stop", "{}")]),
    Step(finish="tool_calls"),
]


def respond(steps: list[Step]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    response = Response(id="resp_1", created_at=1, model="m", output=[])
    events: list[dict[str, Any]] = []
    builder = Builder(response, lambda event: events.append(msgspec.to_builtins(event)))
    builder.opening()
    for step in steps:
        builder.take(step)
    builder.close(USAGE)
    return msgspec.to_builtins(response), events


def message(steps: list[Step]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    answer = Answer("msg_1", "m", MessagesUsage(10, 0), [])
    events: list[dict[str, Any]] = []
    made = Blocks(answer, lambda event: events.append(msgspec.to_builtins(event)))
    made.opening()
    for step in steps:
        made.take(step)
    made.close(USAGE)
    return msgspec.to_builtins(answer), events


def test_a_response_has_an_item_for_each_kind_of_thing_said() -> None:
    response, events = respond(STEPS)
    assert [item["type"] for item in response["output"]] == ["reasoning", "message", "function_call", "function_call"]
    thought, said, find, stop = response["output"]
    assert thought["content"] == [{"type": "reasoning_text", "text": "let me see"}]
    assert said["content"][0]["text"] == "I will look."
    assert (find["name"], find["call_id"], json.loads(find["arguments"])) == ("find", "call_a", {"q": "x"})
    assert (stop["name"], stop["call_id"], stop["arguments"]) == ("stop", "call_b", "{}")
    assert {item["status"] for item in response["output"]} == {"completed"} and response["status"] == "completed"
    assert response["usage"]["output_tokens_details"] == {"reasoning_tokens": 3}
    assert events[-1]["response"] == response and events[-1]["type"] == "response.completed"
    assert [event["sequence_number"] for event in events] == list(range(len(events)))


def test_every_event_and_response_is_one_that_openais_client_knows() -> None:
    response, events = respond(STEPS)
    known = TypeAdapter(ResponseStreamEvent)
    for event in events:
        assert known.validate_python(event, strict=False).type == event["type"]
    OpenAIResponse.model_validate(response)
    added = [event for event in events if event["type"] == "response.output_item.added"]
    ended = [event for event in events if event["type"] == "response.output_item.done"]
    assert [event["output_index"] for event in added] == [event["output_index"] for event in ended] == [0, 1, 2, 3]
    assert [event["item"] for event in ended] == response["output"]
    assert all(event["item"]["status"] == "in_progress" for event in added)


def test_a_response_that_fails_or_is_cut_says_so() -> None:
    cut, events = respond([Step(text="a"), Step(finish="length")])
    assert (cut["status"], cut["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    assert events[-1]["type"] == "response.incomplete"
    response = Response(id="resp_1", created_at=1, model="m", output=[])
    told: list[str] = []
    builder = Builder(response, lambda event: told.append(event["type"]))
    builder.opening()
    builder.take(Step(text="a"))
    builder.fail(HttpError(500, "gone"))
    assert told[-1] == "response.failed" and response.status == "failed" and response.error is not None
    empty, _ = respond([Step(finish="stop")])
    assert [item["type"] for item in empty["output"]] == ["message"]


def test_a_message_has_a_block_for_each_kind_of_thing_said() -> None:
    answer, events = message(STEPS)
    thought, said, find, stop = answer["content"]
    assert (thought["type"], thought["thinking"]) == ("thinking", "let me see") and thought["signature"]
    assert said == {"type": "text", "text": "I will look."}
    assert find == {"type": "tool_use", "id": "call_a", "name": "find", "input": {"q": "x"}}
    assert stop == {"type": "tool_use", "id": "call_b", "name": "stop", "input": {}}
    assert answer["stop_reason"] == "tool_use"
    assert answer["usage"] == {
        "input_tokens": 6, "output_tokens": 7, "cache_read_input_tokens": 4, "cache_creation_input_tokens": 0
    }  # fmt: skip
    kinds = [event["delta"]["type"] for event in events if event["type"] == "content_block_delta"]
    assert kinds == [
        "thinking_delta", "thinking_delta", "signature_delta", "text_delta", "text_delta",
        "input_json_delta", "input_json_delta", "input_json_delta",
    ]  # fmt: skip
    starts = [event for event in events if event["type"] == "content_block_start"]
    assert [event["index"] for event in starts] == [0, 1, 2, 3]
    assert starts[2]["content_block"] == {"type": "tool_use", "id": "call_a", "name": "find", "input": {}}
    parts = [e["delta"]["partial_json"] for e in events if e.get("index") == 2 and "partial_json" in e.get("delta", {})]
    assert json.loads("".join(parts)) == {"q": "x"}


@pytest.mark.parametrize(
    ("step", "reason", "sequence"),
    [
        (Step(finish="stop"), "end_turn", None),
        (Step(finish="stop", stop_reason=7), "end_turn", None),
        (Step(finish="stop", stop_reason="END"), "stop_sequence", "END"),
        (Step(finish="length"), "max_tokens", None),
    ],
)
def test_a_message_says_why_it_ended(step: Step, reason: str, sequence: str | None) -> None:
    answer, _ = message([Step(text="a"), step])
    assert (answer["stop_reason"], answer["stop_sequence"]) == (reason, sequence)


def test_an_answers_items_are_the_next_turns_messages() -> None:
    response = Response(id="resp_1", created_at=1, model="m", output=[])
    builder = Builder(response, lambda event: None)
    for step in STEPS:
        builder.take(step)
    builder.close(USAGE)
    calls = [
        {"id": "call_a", "type": "function", "function": {"name": "find", "arguments": '{"q": "x"}'}},
        {"id": "call_b", "type": "function", "function": {"name": "stop", "arguments": "{}"}},
    ]
    assert items.answered(response.output) == [
        {"role": "assistant", "content": "I will look.", "reasoning_content": "let me see", "tool_calls": calls}
    ]
    sent = msgspec.to_builtins(response.output)
    sent.append({"type": "function_call_output", "call_id": "call_a", "output": "found"})
    asked = decode(ResponseRequest, msgspec.json.encode({"input": sent}))
    assert items.messages(items.given(asked))[-1] == {"role": "tool", "tool_call_id": "call_a", "content": "found"}
    assert items.messages(items.given(asked))[:-1] == items.answered(response.output)


def test_a_response_asks_for_tools_and_forms_as_a_chat_does() -> None:
    tool = {"type": "function", "name": "find", "parameters": {"type": "object"}, "strict": None}
    body = {
        "input": "x", "tools": [tool], "tool_choice": {"type": "function", "name": "find"},
        "reasoning": {"effort": "low"},
        "text": {"format": {"type": "json_schema", "name": "a", "schema": {}, "strict": True}},
    }  # fmt: skip
    chat = items.as_chat(decode(ResponseRequest, msgspec.json.encode(body)), [{"role": "user", "content": "x"}])
    tools = chat.wanted_tools()
    assert (tools.choice, tools.named, tools.given[0]["function"]["name"]) == ("named", "find", "find")
    assert chat.response_format is not None and chat.reasoning_effort == "low"
    allowed = {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "b"}]}
    body |= {"tool_choice": allowed, "tools": [tool, {**tool, "name": "b"}]}
    chat = items.as_chat(decode(ResponseRequest, msgspec.json.encode(body)), [{"role": "user", "content": "x"}])
    assert [given["function"]["name"] for given in chat.wanted_tools().given] == ["b"]


def test_a_messages_blocks_are_a_chat() -> None:
    body = {
        "max_tokens": 5, "system": "s", "tools": [{"name": "find", "input_schema": {"type": "object"}}],
        "tool_choice": {"type": "any", "disable_parallel_tool_use": True}, "thinking": {"type": "disabled"},
        "messages": [
            {"role": "user", "content": "x"},
            {"role": "assistant", "content": [
                {"type": "thinking", "thinking": "hm", "signature": "s"}, {"type": "text", "text": "I look"},
                {"type": "tool_use", "id": "t1", "name": "find", "input": {"q": 1}},
            ]},
            {"role": "user", "content": [
                {"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "found"}]},
                {"type": "text", "text": "go on"},
            ]},
        ],
    }  # fmt: skip
    chat = blocks.as_chat(decode(MessagesRequest, msgspec.json.encode(body)))
    plain = [{k: v for k, v in msgspec.to_builtins(each).items() if v is not None} for each in chat.messages]
    call = plain[2].pop("tool_calls")[0]
    assert (call["id"], call["function"]) == ("t1", {"name": "find", "arguments": '{"q":1}'})
    assert plain == [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": "I look", "reasoning_content": "hm"},
        {"role": "tool", "content": "found", "tool_call_id": "t1"},
        {"role": "user", "content": "go on"},
    ]
    tools = chat.wanted_tools()
    assert (tools.choice, tools.parallel) == ("required", False)
    assert chat.chat_template_kwargs == {"enable_thinking": False} and chat.max_tokens == 5


def test_tools_that_are_not_functions_are_refused() -> None:
    body = {"max_tokens": 5, "messages": [], "tools": [{"name": "x", "type": "web_search_20250305"}]}
    with pytest.raises(RequestError, match="web_search"):
        blocks.as_chat(decode(MessagesRequest, msgspec.json.encode(body)))
