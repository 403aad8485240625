"""A random model, which knows nothing of tools, made to call them by a grammar: every call fits its schema."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import openai
import pytest
from served import Served, served
from tiny_checkpoint import make_checkpoint

ASK: list[Any] = [{"role": "user", "content": "weather?"}]
DAYS = {"enum": [1, 2, 3]}
WEATHER = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Rome"]}, "days": DAYS},
    "required": ["city", "days"],
    "additionalProperties": False,
}
NOTHING = {"type": "object", "properties": {}, "additionalProperties": False}
SCHEMAS = {"weather": WEATHER, "now": NOTHING}
TOOLS: list[Any] = [
    {"type": "function", "function": {"name": name, "parameters": schema, "strict": True}}
    for name, schema in SCHEMAS.items()
]
NAMED = {"type": "function", "function": {"name": "weather"}}


@pytest.fixture(scope="module", params=["hermes", "mistral", "pythonic", "qwen3_coder"])
def enforcing(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder: Path = make_checkpoint(tmp_path_factory.mktemp("enforcing"))
    short = "{# of tools it says nothing, for the context is short #}{% for m in messages %}{{ m.content }}{% endfor %}"
    (folder / "chat_template.jinja").write_text(short)
    with served(folder, tool_call_parser=request.param) as server:
        server.parser = request.param  # type: ignore[attr-defined]
        yield server


def test_every_call_fits(enforcing: Served) -> None:
    client = openai.OpenAI(base_url=enforcing.url + "/v1", api_key="x", http_client=httpx.Client(trust_env=False))
    given: dict[str, Any] = {"model": "tiny", "messages": ASK, "tools": TOOLS, "max_tokens": 400}
    whole = 0
    for seed in range(4):
        answer = client.chat.completions.create(**given, tool_choice="required", n=3, seed=seed)
        for choice in answer.choices:
            done = choice.finish_reason == "tool_calls"  # else a call that was cut is content, or not whole
            assert (done and choice.message.content is None) or choice.finish_reason == "length"
            complete = (choice.message.tool_calls or [])[: None if done else -1]
            whole += len(complete)
            for call in complete:
                jsonschema.validate(json.loads(call.function.arguments), SCHEMAS[call.function.name])
    assert whole > 8
    one = client.chat.completions.create(**given, tool_choice=NAMED, seed=1).choices[0]
    assert one.finish_reason == "tool_calls" and [call.function.name for call in one.message.tool_calls] == ["weather"]
    with client.chat.completions.stream(**given, tool_choice=NAMED, seed=1) as stream:
        streamed = stream.get_final_completion().choices[0].message.tool_calls
    assert [call.function.arguments for call in streamed] == [
        call.function.arguments for call in one.message.tool_calls
    ]
    form = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"enum": [7]}}}
    either = client.chat.completions.create(**given, response_format=form, seed=2).choices[0]
    assert either.message.content == "7" or either.message.tool_calls
    if enforcing.parser == "pythonic":  # type: ignore[attr-defined]
        return  # whose literals are read by a grammar of their own
    unfit = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "$ref": "#/no"}}}]
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model="tiny", messages=ASK, tools=unfit, tool_choice="required")
    assert refused.value.param == "tools"
