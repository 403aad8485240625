"""Forms over HTTP, as OpenAI's and vLLM's clients ask for them; processes that die in the middle change no answer."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import openai
import psutil
import pytest
from served import Served, is_running, served

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 10},
        "kind": {"enum": ["large animal", "small plant"]},
        "sizes": {"type": "array", "items": {"type": "integer"}, "minItems": 1, "maxItems": 3},
    },
    "required": ["name", "kind", "sizes"],
    "additionalProperties": False,
}
CHAT: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 150, "seed": 1}


@pytest.fixture(scope="module")
def own(tiny: Path) -> Iterator[Served]:
    with served(tiny) as server:
        yield server


@pytest.fixture
def client(own: Served) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{own.url}/v1", api_key="none", max_retries=0)


def schema_format(schema: Any, **more: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, **more}}


def fits(text: str | None) -> bool:
    return bool(jsonschema.Draft202012Validator(SCHEMA).is_valid(json.loads(str(text))))


def test_openais_client(client: openai.OpenAI) -> None:
    made = client.chat.completions.create(**CHAT, n=4, response_format=schema_format(SCHEMA, strict=True))
    assert all(choice.finish_reason == "stop" and fits(choice.message.content) for choice in made.choices)
    assert len({choice.message.content for choice in made.choices}) > 1
    plain = client.chat.completions.create(**CHAT, response_format={"type": "text"})
    assert plain.choices[0].message.content
    whole = client.chat.completions.create(**{**CHAT, "temperature": 0}, response_format={"type": "json_object"})
    assert str(whole.choices[0].message.content).startswith("{")


def test_a_stream_says_what_the_whole_answer_says(client: openai.OpenAI) -> None:
    asked = {**CHAT, "n": 3, "response_format": schema_format(SCHEMA)}
    whole = client.chat.completions.create(**asked)
    said: dict[int, str] = {}
    for chunk in client.chat.completions.create(**asked, stream=True):
        for choice in chunk.choices:
            said[choice.index] = said.get(choice.index, "") + (choice.delta.content or "")
    assert said == {choice.index: choice.message.content for choice in whole.choices}
    assert all(fits(text) for text in said.values())


@pytest.mark.parametrize(
    ("fields", "pattern"),
    [
        ({"structured_outputs": {"regex": "[ab]{4}"}}, "[ab]{4}"),
        ({"structured_outputs": {"choice": ["left", "right"]}}, "left|right"),
        ({"structured_outputs": {"grammar": 'root ::= "<" [x-z]{3} ">"'}}, "<[x-z]{3}>"),
        ({"structured_outputs": {"json": {"const": [1, 2]}, "disable_any_whitespace": True}}, r"\[1,2\]"),
        (
            {"structured_outputs": {"json": '{"const": [1, 2]}', "whitespace_pattern": " {2}"}},
            r"\[( {2})?1( {2})?,.*\]",
        ),
        ({"guided_regex": "[ab]{4}"}, "[ab]{4}"),
        ({"guided_choice": ["left", "right"]}, "left|right"),
        ({"guided_json": {"enum": [7]}}, "7"),
        ({"guided_grammar": 'start: "q" /[0-9]/'}, "q[0-9]"),
        ({"response_format": {"type": "structural_tag", "format": {"type": "const_string", "value": "ok"}}}, "ok"),
    ],
)
def test_vllms_fields(own: Served, fields: dict[str, Any], pattern: str) -> None:
    answer = own.http.post("/v1/completions", json={"prompt": "x", "max_tokens": 60, **fields})
    choice = answer.json()["choices"][0]
    assert re.fullmatch(pattern, choice["text"]) and choice["finish_reason"] == "stop"
    assert "structured_output_error" not in choice


def test_a_keyword_that_no_grammar_holds_is_named(client: openai.OpenAI) -> None:
    schema = {"type": "array", "items": {"enum": [1]}, "minItems": 2, "maxItems": 2, "uniqueItems": True}
    with pytest.raises(openai.BadRequestError, match="uniqueItems") as caught:
        client.chat.completions.create(**CHAT, response_format=schema_format(schema))
    assert caught.value.param == "response_format.json_schema.schema"
    for stream in (False, True):
        answer: Any = client.chat.completions.create(
            **CHAT, response_format=schema_format(schema, strict=False), stream=stream
        )
        last = list(answer)[-1] if stream else answer
        assert last.choices[0].structured_output_error == "answer: breaks 'uniqueItems'"
        assert last.choices[0].finish_reason == "stop"


def test_an_empty_intersection_is_that_requests_400(own: Served) -> None:
    fields = {"structured_outputs": {"regex": "[0-9]+"}, "allowed_token_ids": [70]}
    answer = own.http.post("/v1/completions", json={"prompt": "x", **fields})
    assert answer.status_code == 400 and "in common" in answer.json()["error"]["message"]
    assert answer.json()["error"]["param"] == "structured_outputs"


def grammar_processes(server: Served) -> dict[str, psutil.Process]:
    """The front's judge and the model's masks."""
    front = psutil.Process(server.process.pid)
    found = {}
    for process in front.children(recursive=True):
        if is_running(process, "twofold.engine.grammar.child"):
            found["judge" if process.ppid() == front.pid else "masks"] = process
    return found


def stream(server: Served, stop_at: int, act: Any) -> str:
    """What a stream says in all, if something is done after so many of its events."""
    body = {"prompt": "go", "max_tokens": 200, "seed": 5, "stream": True, "structured_outputs": {"json": SCHEMA}}
    said, events = "", 0
    with server.http.stream("POST", "/v1/completions", json=body) as answer:
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                event = json.loads(line.removeprefix("data: "))
                said += event["choices"][0]["text"]
                events += 1
                if events == stop_at:
                    act()
    return said


def test_deaths_in_the_middle_change_no_answer(own: Served) -> None:
    undisturbed = stream(own, -1, None)
    assert fits(undisturbed)
    processes = grammar_processes(own)
    assert set(processes) == {"judge", "masks"}
    assert stream(own, 3, processes["masks"].kill) == undisturbed
    assert grammar_processes(own)["masks"].pid != processes["masks"].pid
    processes["judge"].kill()
    other = {"structured_outputs": {"regex": "[ab]{5}"}, "prompt": "x"}
    assert own.http.post("/v1/completions", json=other).status_code == 200
    (model,) = [p for p in psutil.Process(own.process.pid).children() if is_running(p, "twofold.serve.worker")]
    assert stream(own, 4, model.kill) == undisturbed


def test_no_form_no_process(tiny: Path) -> None:
    with served(tiny) as server:
        assert server.http.post("/v1/completions", json={"prompt": "x"}).status_code == 200
        assert grammar_processes(server) == {}
