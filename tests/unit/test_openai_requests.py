"""Request bodies: what is taken, and for what is not, the field's path."""

from __future__ import annotations

import json
from typing import Any

import pytest

from twofold.core import RequestError
from twofold.serve.bodies import decode
from twofold.serve.errors import HttpError
from twofold.serve.messages import plain
from twofold.serve.openai import NOT_DONE, ChatRequest, CompletionRequest

HI = [{"role": "user", "content": "hi"}]


def chat(**fields: Any) -> ChatRequest:
    body = decode(ChatRequest, json.dumps({"messages": HI, **fields}).encode())
    body.check()
    plain(body.messages, 100)
    body.params({})
    body.wanted_tools()
    return body


def completion(**fields: Any) -> CompletionRequest:
    body = decode(CompletionRequest, json.dumps({"prompt": "hi", **fields}).encode())
    body.check()
    body.prompts(4)
    body.params({})
    return body


def test_sampling_fields_reach_the_sampler() -> None:
    sent: dict[str, Any] = {
        "n": 2, "temperature": 0.5, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "presence_penalty": 1, "seed": 4,
        "frequency_penalty": -1, "repetition_penalty": 1.1, "min_tokens": 2, "stop": ["a"], "stop_token_ids": [3],
        "ignore_eos": True, "include_stop_str_in_output": True, "skip_special_tokens": False, "prompt_logprobs": 1,
        "logit_bias": {"7": 2}, "allowed_token_ids": [1, 2],
    }  # fmt: skip
    for params in (chat(**sent, max_completion_tokens=9).params({}), completion(**sent, max_tokens=9).params({})):
        assert params.max_tokens == 9 and params.logit_bias == {7: 2.0} and params.stop == ("a",)
        for name in set(sent) - {"logit_bias", "stop"}:
            value = getattr(params, name)
            assert (list(value) if isinstance(value, tuple) else value) == sent[name]


def test_defaults_are_openais_and_the_checkpoints() -> None:
    assert completion().params({}).max_tokens == 16
    assert chat().params({}).max_tokens is None
    assert chat(seed=-1).params({}).seed is None
    assert chat(top_p=0.5).params({"top_p": 0.1, "top_k": 3}).top_p == 0.5
    assert chat().params({"top_p": 0.1, "top_k": 3}).top_k == 3


def test_scoring_a_prompt_generates_nothing() -> None:
    body = completion(echo=True, max_tokens=0, logprobs=2)
    params = body.params({})
    assert body.scores_only and params.max_tokens == 1 and params.prompt_logprobs == 2


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a", ["a"]),
        ([1, 2], [[1, 2]]),
        (["a", "b"], ["a", "b"]),
        ([[1], [2, 3]], [[1], [2, 3]]),
    ],
)
def test_prompts_of_every_kind(prompt: Any, expected: Any) -> None:
    assert completion(prompt=prompt).prompts(4) == expected


@pytest.mark.parametrize("prompt", [[], ["a", 1], [[1], 2], ["a", [1]], ["a"] * 5])
def test_prompts_that_are_not(prompt: Any) -> None:
    with pytest.raises(RequestError) as caught:
        completion(prompt=prompt)
    assert caught.value.param == "prompt"


CALL: dict[str, Any] = {"id": "1", "function": {"name": "f", "arguments": "{}"}}
TOOL: dict[str, Any] = {"type": "function", "function": {"name": "f"}}
BAD_CHATS: list[tuple[dict[str, Any], str, str]] = [
    ({"temprature": 1}, "temprature", "did you mean 'temperature'"),
    ({"messages": [{"role": "user", "contnt": "x"}]}, "messages[0].contnt", "did you mean 'content'"),
    ({"messages": [{"role": "wizard", "content": "x"}]}, "messages[0].role", "wizard"),
    ({"messages": [*HI, {"role": "user"}]}, "messages[1].content", "needs content"),
    ({"messages": []}, "messages", "1 to"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}]},
     "messages[0].content[0].type", "send text"),
    ({"messages": [{"role": "assistant", "tool_calls": [{"id": "1"}]}]},
     "messages[0].tool_calls[0].function", "missing"),
    ({"messages": [{"role": "user", "content": "x", "tool_calls": [CALL]}]}, "messages[0].tool_calls", "assistant"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].tool_call_id", "the id of the call"),
    ({"messages": [{"role": "user", "content": "x", "tool_call_id": "1"}]}, "messages[0].tool_call_id", "no other"),
    ({"n": "2"}, "n", "Expected"),
    ({"n": 0}, "n", "[1, 16]"),
    ({"n": 10**30}, "n", "[1, 16]"),
    ({"n": True}, "n", "Expected"),
    ({"temperature": 2.5}, "temperature", "[0, 2]"),
    ({"temperature": "hot"}, "temperature", "Expected"),
    ({"top_logprobs": 3}, "top_logprobs", "needs logprobs"),
    ({"logprobs": True, "top_logprobs": 99}, "top_logprobs", "[0, 20]"),
    ({"max_completion_tokens": 0}, "max_completion_tokens", "[1,"),
    ({"max_tokens": 3, "max_completion_tokens": 4}, "max_completion_tokens", "differ"),
    ({"stream_options": {"include_usage": True}}, "stream_options", "needs stream"),
    ({"stream": True, "stream_options": {"usage": True}}, "stream_options.usage", "unknown field"),
    ({"logit_bias": {"x": 1}}, "logit_bias", "Expected"),
    ({"logit_bias": {"5": 1000}}, "logit_bias", "[-100, 100]"),
    ({"stop": [""]}, "stop", "1 to 256"),
    ({"stop": ["a"] * 17}, "stop", "at most 16"),
    ({"stop": ["a", 5]}, "stop[1]", "Expected"),
    ({"response_format": {"type": "xml"}}, "response_format.type", "Invalid value 'xml'"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "missing"),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
     "response_format.json_schema.schema", "no schema"),
    ({"response_format": {"type": "structural_tag"}}, "response_format", "structural_tag"),
    ({"response_format": {"type": "json_object"}, "guided_regex": "a"}, "response_format", "exclude each other"),
    ({"structured_outputs": {}}, "structured_outputs", "exactly one"),
    ({"structured_outputs": {"regex": "a", "json": {}}}, "structured_outputs", "exactly one"),
    ({"structured_outputs": {"regx": "a"}}, "structured_outputs.regx", "did you mean 'regex'"),
    ({"structured_outputs": {"regex": ""}}, "structured_outputs.regex", "is empty"),
    ({"structured_outputs": {"regex": "a" * 70_000}}, "structured_outputs.regex", "at most 65536"),
    ({"structured_outputs": {"choice": []}}, "structured_outputs.choice", "1 to 10000"),
    ({"structured_outputs": {"json": "{"}}, "structured_outputs.json", "is not JSON"),
    ({"structured_outputs": {"json": {"enum": list(range(10_001))}}}, "structured_outputs.json", "at most 10000"),
    ({"structured_outputs": {"json": {"x-guidance": {}}}}, "structured_outputs.json", "server's"),
    ({"guided_json": "nope"}, "guided_json", "is not JSON"),
    ({"guided_choice": [""]}, "guided_choice", "at least one character"),
    ({"tools": [{"type": "function"}]}, "tools[0].function", "missing"),
    ({"tools": [{"function": {"name": "a b"}}]}, "tools[0].function.name", "letters"),
    ({"tools": [TOOL, TOOL]}, "tools[1].function.name", "two functions"),
    ({"tools": [TOOL] * 300}, "tools", "at most 256"),
    ({"tools": [{"function": {"name": "a", "parameters": {"type": "array"}}}]},
     "tools[0].function.parameters", "object"),
    ({"tools": [TOOL], "tool_choice": "maybe"}, "tool_choice", "required"),
    ({"tool_choice": "required"}, "tool_choice", "needs tools"),
    ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "g"}}}, "tool_choice", "not one of"),
    ({"reasoning_effort": "much"}, "reasoning_effort", "Invalid enum"),
    ({"store": True}, "store", "not done"),
    ({"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message", "exclude"),
    ({"chat_template": "{{ 1 }}"}, "chat_template", "operator"),
    ({"request_id": "x" * 300}, "request_id", "1 to 256"),
    ({"cache_salt": ""}, "cache_salt", "1 to 256"),
    ({"priority": 2**40}, "priority", "priority must be"),
    ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens", "at least 1"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "param", "words"), BAD_CHATS, ids=lambda value: json.dumps(value)[:40])
def test_a_bad_field_is_named(fields: dict[str, Any], param: str, words: str) -> None:
    with pytest.raises((RequestError, HttpError)) as caught:
        chat(**fields)
    error = HttpError.of(caught.value)
    assert (error.status, error.param) == (400, param)
    assert words in str(error)


@pytest.mark.parametrize("name", sorted(NOT_DONE))
def test_every_field_that_is_not_done_is_refused_and_its_harmless_values_are_not(name: str) -> None:
    kind = chat if name in ChatRequest.__struct_fields__ else completion
    for harmless in (None, *NOT_DONE[name][0]):
        kind(**{name: harmless})
    with pytest.raises(RequestError) as caught:
        kind(**{name: {"surely": "not harmless"}})
    assert caught.value.param == name


def test_what_asks_for_nothing_is_taken() -> None:
    chat(user="u", metadata={"a": "b"}, parallel_tool_calls=True, safety_identifier="s", prompt_cache_key="k")
    chat(messages=[{"role": "developer", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}])


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"[]", b"null", b"nan", b'{"prompt":"a"', b'{"prompt":NaN}', b'{"prompt":"\\ud800"}',
        b'{"prompt":"\xff"}', b"[" * 200_000, b'{"prompt":"a","x":' + b'{"a":' * 100_000, b'{"prompt":1e999}',
        b'{"prompt":"a","temperature":1e999}', b'{"prompt":"a","n":' + b"9" * 5000 + b"}", b"\xef\xbb\xbf{}", b"{}",
    ],
    ids=lambda body: body[:20].decode("latin-1") or "empty",
)  # fmt: skip
def test_what_is_not_a_request_is_400(body: bytes) -> None:
    with pytest.raises(HttpError) as caught:
        decode(CompletionRequest, body)
    assert caught.value.status == 400
    assert len(caught.value.body()) < 1000
