"""Anthropic's Messages API over real processes, its shapes written out by hand."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from served import Served, served

HI = [{"role": "user", "content": "The quick brown fox"}]


def create(server: Served, **fields: Any) -> dict[str, Any]:
    answer = server.http.post(
        "/v1/messages", json={"model": "tiny", "messages": HI, "max_tokens": 20, "temperature": 0, **fields}
    )
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def events(server: Served, **fields: Any) -> list[tuple[str, dict[str, Any]]]:
    body = {"model": "tiny", "messages": HI, "max_tokens": 20, "temperature": 0, "stream": True, **fields}
    with server.http.stream("POST", "/v1/messages", json=body) as answer:
        assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/event-stream")
        text = "".join(answer.iter_text())
    found = []
    for event in text.removesuffix("\n\n").split("\n\n"):
        name, data = event.split("\n")
        found.append((name.removeprefix("event: "), json.loads(data.removeprefix("data: "))))
    return found


def test_a_message_has_anthropics_shape(server: Served) -> None:
    chat = server.http.post("/v1/chat/completions", json={"messages": HI, "max_tokens": 20, "temperature": 0}).json()
    answer = create(server)
    assert answer.pop("id").startswith("msg_")
    assert (
        answer["usage"].pop("cache_read_input_tokens") + answer["usage"].pop("input_tokens")
        == (chat["usage"]["prompt_tokens"])
    )
    assert answer == {
        "type": "message",
        "role": "assistant",
        "model": "tiny",
        "content": [{"type": "text", "text": chat["choices"][0]["message"]["content"]}],
        "stop_reason": "max_tokens",
        "stop_sequence": None,
        "usage": {"output_tokens": 20, "cache_creation_input_tokens": 0},
    }


def test_a_message_streamed_is_the_message_whole(server: Served) -> None:
    whole, told = create(server), events(server)
    names = [name for name, _ in told]
    assert names[:3] == ["message_start", "ping", "content_block_start"]
    assert names[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert set(names[3:-3]) == {"content_block_delta"}
    assert all(data["type"] == name for name, data in told)
    start = told[0][1]["message"]
    assert (start["content"], start["stop_reason"], start["usage"]["output_tokens"]) == ([], None, 0)
    assert told[2][1] == {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}}
    deltas = [data for name, data in told if name == "content_block_delta"]
    assert "".join(data["delta"]["text"] for data in deltas) == whole["content"][0]["text"]
    assert all(data["index"] == 0 and data["delta"]["type"] == "text_delta" for data in deltas)
    assert told[-3][1] == {"type": "content_block_stop", "index": 0}
    assert told[-2][1]["delta"] == {"stop_reason": "max_tokens", "stop_sequence": None}
    assert told[-2][1]["usage"]["output_tokens"] == 20
    assert told[-1][1] == {"type": "message_stop"}


def test_a_stop_sequence_is_named(server: Served) -> None:
    text = create(server, max_tokens=40)["content"][0]["text"]
    stop = next(text[at : at + 3] for at in range(4, 30) if "�" not in text[at : at + 3])
    answer = create(server, max_tokens=40, stop_sequences=[stop])
    assert (answer["stop_reason"], answer["stop_sequence"]) == ("stop_sequence", stop)
    assert answer["content"][0]["text"] == text[: text.index(stop)]


def test_blocks_and_system_are_the_texts_they_hold(server: Served) -> None:
    def text(value: str) -> dict[str, Any]:
        return {"type": "text", "text": value, "cache_control": {"type": "ephemeral"}}

    plain = create(server, system="be brief")
    assert (
        create(
            server, system=[text("be brief")], messages=[{"role": "user", "content": [text("The quick brown fox")]}]
        )["content"]
        == (plain["content"])
    )
    assert plain["content"] != create(server)["content"]


def test_an_answer_that_is_begun_goes_on(server: Served) -> None:
    whole = create(server, max_tokens=30)["content"][0]["text"]
    begun = [*HI, {"role": "assistant", "content": "The quick"}]
    assert create(server, messages=begun)["content"][0]["text"] != whole
    count = server.http.post("/v1/messages/count_tokens", json={"model": "tiny", "messages": begun}).json()
    closed = server.http.post("/v1/messages/count_tokens", json={"messages": [*begun, *HI]}).json()
    assert count["input_tokens"] < closed["input_tokens"]


def test_tokens_are_counted_without_an_answer(server: Served) -> None:
    counted = server.http.post("/v1/messages/count_tokens", json={"model": "tiny", "messages": HI, "system": "x"})
    usage = create(server, system="x")["usage"]
    assert counted.json() == {"input_tokens": usage["input_tokens"] + usage["cache_read_input_tokens"]}


@pytest.mark.parametrize(
    ("fields", "status", "kind", "word"),
    [
        ({"max_tokens": None}, 400, "invalid_request_error", "max_tokens"),
        ({"model": "other"}, 404, "not_found_error", "other"),
        ({"messages": []}, 400, "invalid_request_error", "messages"),
        ({"messages": [{"role": "system", "content": "x"}]}, 400, "invalid_request_error", "role"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, 400, "invalid_request_error", "image"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, 400, "invalid_request_error", "text"),
        ({"temperature": -1}, 400, "invalid_request_error", "temperature"),
        ({"stop_sequences": [""]}, 400, "invalid_request_error", "stop_sequences"),
        ({"tools": [{"name": "x"}]}, 400, "invalid_request_error", "input_schema"),
        ({"tool_choice": {"type": "tool"}}, 400, "invalid_request_error", "name"),
        ({"mcp_servers": [{}]}, 400, "invalid_request_error", "mcp_servers"),
        ({"max_token": 1}, 400, "invalid_request_error", "max_tokens"),
    ],
)
def test_errors_have_anthropics_shape(
    server: Served, fields: dict[str, Any], status: int, kind: str, word: str
) -> None:
    body = {k: v for k, v in {"messages": HI, "max_tokens": 5, **fields}.items() if v is not None}
    answer = server.http.post("/v1/messages", json=body)
    found = answer.json()
    assert answer.status_code == status and set(found) == {"type", "error"} and found["type"] == "error"
    assert set(found["error"]) == {"type", "message"} and found["error"]["type"] == kind
    assert word in found["error"]["message"], found


def test_an_error_in_a_stream_is_an_event(server: Served) -> None:
    body = {"messages": HI, "max_tokens": 400, "stream": True, "temperature": 0.0}
    with server.http.stream("POST", "/v1/messages", json=body, headers={"X-Request-Timeout": "0.02"}) as answer:
        last = "".join(answer.iter_text()).rstrip().split("\n\n")[-1]
    name, data = last.split("\n")
    assert name == "event: error"
    assert json.loads(data.removeprefix("data: "))["error"]["type"] == "timeout_error"


@pytest.fixture(scope="module")
def locked(tiny: Path) -> Iterator[Served]:
    with served(tiny, api_keys=["key-of-one-owner", "key-of-another"], limits={"body_bytes": 20_000}) as server:
        yield server


def test_the_key_is_taken_from_either_header(locked: Served) -> None:
    def status(**headers: str) -> httpx.Response:
        return locked.http.post("/v1/messages", json={"messages": HI, "max_tokens": 2}, headers=headers)

    assert status(**{"x-api-key": "key-of-one-owner"}).status_code == 200
    assert status(authorization="Bearer key-of-another").status_code == 200
    refused = status(**{"x-api-key": "key-of-nobody"})
    assert refused.status_code == 401
    assert refused.json()["type"] == "error" and refused.json()["error"]["type"] == "authentication_error"
    large = locked.http.post(
        "/v1/messages",
        content=b"x" * 30_000,
        headers={"x-api-key": "key-of-one-owner", "content-type": "application/json"},
    )
    assert (large.status_code, large.json()["error"]["type"]) == (413, "request_too_large")


def test_a_response_is_its_owners_alone(locked: Served) -> None:
    mine, theirs = ({"authorization": f"Bearer key-of-{who}"} for who in ("one-owner", "another"))
    made = locked.http.post("/v1/responses", json={"input": "hi", "max_output_tokens": 2}, headers=mine).json()
    path = f"/v1/responses/{made['id']}"
    assert locked.http.get(path, headers=mine).status_code == 200
    for refused in (
        locked.http.get(path, headers=theirs),
        locked.http.delete(path, headers=theirs),
        locked.http.get(f"{path}/input_items", headers=theirs),
        locked.http.post("/v1/responses", json={"input": "x", "previous_response_id": made["id"]}, headers=theirs),
    ):
        assert refused.status_code == 404
    assert locked.http.delete(path, headers=mine).json() == {"id": made["id"], "object": "response", "deleted": True}
