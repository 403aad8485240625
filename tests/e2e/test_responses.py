"""The Responses API over real processes: the openai client, streamed and not, kept, continued and cancelled."""

from __future__ import annotations

import json
import time
from typing import Any

import httpx
import openai
import pytest
from served import Served

Made = dict[str, Any]
LONG: Made = {"model": "tiny", "input": "hi", "max_output_tokens": 400, "extra_body": {"ignore_eos": True}}


@pytest.fixture
def client(server: Served) -> openai.OpenAI:
    return openai.OpenAI(base_url=server.url + "/v1", api_key="none needed", http_client=httpx.Client(trust_env=False))


def create(client: openai.OpenAI, **fields: Any) -> Any:
    given: Made = {"model": "tiny", "input": "hi", "max_output_tokens": 20, "extra_body": {"seed": 3}}
    return client.responses.create(**{**given, **fields})


def test_a_response_is_the_chat_of_the_same_words(client: openai.OpenAI) -> None:
    said = create(client, instructions="be brief", temperature=0.7, metadata={"a": "b"})
    chat = client.chat.completions.create(
        model="tiny", seed=3, max_tokens=20, temperature=0.7,
        messages=[{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}],
    )  # fmt: skip
    assert said.output_text == chat.choices[0].message.content and said.output_text
    assert (said.status, said.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert said.usage.output_tokens == 20 and said.usage.input_tokens == chat.usage.prompt_tokens  # type: ignore[union-attr]
    assert said.metadata == {"a": "b"} and said.instructions == "be brief" and said.temperature == 0.7


def test_a_response_streamed_is_the_response_whole(client: openai.OpenAI) -> None:
    whole = create(client)
    events = list(create(client, stream=True))
    kinds = [event.type for event in events]
    assert kinds[:4] == [
        "response.created", "response.in_progress", "response.output_item.added", "response.content_part.added"
    ]  # fmt: skip
    assert kinds[-4:] == [
        "response.output_text.done", "response.content_part.done", "response.output_item.done", "response.incomplete"
    ]  # fmt: skip
    assert set(kinds[4:-4]) == {"response.output_text.delta"}
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert "".join(event.delta for event in events[4:-4]) == events[-4].text == whole.output_text
    last = events[-1].response
    assert last.output_text == whole.output_text and last.usage.output_tokens == whole.usage.output_tokens
    assert events[0].response.output == [] and events[0].response.status == "in_progress"


def test_a_response_goes_on_from_another(client: openai.OpenAI) -> None:
    first = create(client, instructions="forgotten by the second")
    second = create(client, input="and then?", previous_response_id=first.id)
    turns: list[Any] = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": first.output_text},
        {"role": "user", "content": "and then?"},
    ]
    chat = client.chat.completions.create(model="tiny", seed=3, max_tokens=20, messages=turns)
    assert second.output_text == chat.choices[0].message.content
    assert create(client, input=turns).output_text == second.output_text
    items = client.responses.input_items.list(second.id, order="asc").data
    assert [item.content[0].text for item in items] == ["and then?"]  # type: ignore[union-attr, index]


def test_what_is_kept_is_found_until_it_is_deleted(client: openai.OpenAI) -> None:
    said = create(client)
    assert client.responses.retrieve(said.id) == said
    client.responses.delete(said.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(said.id)
    with pytest.raises(openai.NotFoundError) as caught:
        create(client, previous_response_id=said.id)
    assert caught.value.param == "previous_response_id"
    unkept = create(client, store=False)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(unkept.id)


def test_one_in_the_background_is_waited_for(client: openai.OpenAI) -> None:
    said = create(client, background=True)
    assert said.status == "queued" and said.background
    deadline = time.monotonic() + 20
    while said.status in ("queued", "in_progress"):
        assert time.monotonic() < deadline
        said = client.responses.retrieve(said.id)
        time.sleep(0.01)
    assert said.output_text == create(client).output_text


def test_one_in_the_background_is_cancelled_and_frees_its_blocks(client: openai.OpenAI, server: Served) -> None:
    with server.still():
        said = client.responses.create(**LONG, background=True)
        server.wait(lambda: server.stats()["requests"])
        stopped = client.responses.cancel(said.id)
    assert stopped.status == "cancelled"
    server.wait(server.idle)
    assert client.responses.retrieve(said.id).status == "cancelled"
    assert client.responses.cancel(said.id).status == "cancelled"
    with pytest.raises(openai.BadRequestError, match="background"):
        client.responses.cancel(create(client).id)


def test_a_stream_in_the_background_outlives_its_reader_and_is_read_again(client: openai.OpenAI) -> None:
    seen = []
    with create(client, background=True, stream=True, max_output_tokens=60) as stream:
        for event in stream:
            seen.append(event)
            if len(seen) == 8:
                break
    name = seen[0].response.id
    later = list(client.responses.retrieve(name, stream=True, starting_after=seen[-1].sequence_number))
    assert [event.sequence_number for event in (*seen, *later)] == list(range(len(seen) + len(later)))
    assert later[-1].type == "response.incomplete"
    text = "".join(event.delta for event in (*seen, *later) if event.type == "response.output_text.delta")
    assert text == later[-1].response.output_text == client.responses.retrieve(name).output_text


def test_a_reader_that_leaves_stops_what_was_written_for_him(client: openai.OpenAI, server: Served) -> None:
    with server.still():
        with client.responses.create(**LONG, stream=True) as stream:
            name = next(iter(stream)).response.id  # type: ignore[union-attr]
        server.wait(lambda: not server.stats()["requests"])
    server.wait(server.idle)
    assert client.responses.retrieve(name).status == "cancelled"


def test_logprobs_come_when_included(client: openai.OpenAI) -> None:
    said = create(client, include=["message.output_text.logprobs"], top_logprobs=2, max_output_tokens=5)
    found = said.output[0].content[0].logprobs
    assert len(found) == 5 and all(len(token.top_logprobs) == 2 for token in found)


def test_a_talk_that_is_too_long_loses_its_beginning_when_asked(client: openai.OpenAI) -> None:
    turns: list[Any] = [{"role": "user", "content": f"{number} the quick brown fox " * 3} for number in range(40)]
    with pytest.raises(openai.BadRequestError) as caught:
        create(client, input=turns)
    assert (caught.value.param, caught.value.code) == ("input", "context_length_exceeded")
    assert create(client, input=turns, truncation="auto").usage.input_tokens < 512


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": 5}, "input"),
        ({"input": [{"role": "king", "content": "x"}]}, "input"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content[0].type"),
        ({"input": [{"type": "function_call_output", "call_id": "x"}]}, "input[0]"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"temperature": 3}, "temperature"),
        ({"conversation": "x"}, "conversation"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"background": True, "store": False}, "background"),
        ({"include": ["x"]}, "include"),
        ({"metadata": {"a": "b" * 600}}, "metadata"),
        ({"text": {"format": {"type": "json_schema"}}}, "text.format"),
        ({"top_logprobs": 21}, "top_logprobs"),
        ({"inptu": 1}, "inptu"),
        ({"stream_options": {}}, "stream_options"),
    ],
)
def test_what_is_wrong_is_named(server: Served, fields: Made, param: str) -> None:
    answer = server.http.post("/v1/responses", json={"input": "hi", **fields})
    assert answer.status_code == 400 and answer.json()["error"]["param"] == param, answer.text


def test_an_input_is_needed(server: Served) -> None:
    assert server.http.post("/v1/responses", json={}).status_code == 400


SCHEMA = {
    "type": "object",
    "properties": {"kind": {"enum": ["a", "b"]}, "sure": {"type": "boolean"}},
    "required": ["kind", "sure"],
    "additionalProperties": False,
}


def test_a_form_is_kept_to_in_every_shape(client: openai.OpenAI, server: Served) -> None:
    text: Any = {"format": {"type": "json_schema", "name": "judgement", "schema": SCHEMA, "strict": True}}
    said = create(client, text=text, max_output_tokens=200)
    found = json.loads(said.output_text)
    assert said.status == "completed" and found["kind"] in ("a", "b") and isinstance(found["sure"], bool)
    assert said.text.format.schema_ == SCHEMA
    events = list(create(client, text=text, max_output_tokens=200, stream=True))
    assert events[-1].response.output_text == said.output_text
    body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 200}
    body |= {"output_format": {"type": "json_schema", "schema": SCHEMA}}
    answer = server.http.post("/v1/messages", json=body).json()
    assert set(json.loads(answer["content"][0]["text"])) == {"kind", "sure"} and answer["stop_reason"] == "end_turn"
    wrong: Any = {"format": {"type": "json_schema", "name": "x", "schema": {"type": "nothing"}}}
    with pytest.raises(openai.BadRequestError) as caught:
        create(client, text=wrong)
    assert (caught.value.param or "").startswith("text.format")
