"""The OpenAI API over real processes: the openai client, and what it does not show."""

from __future__ import annotations

import contextlib
import json
import math
import random
from typing import Any

import httpx
import openai
import pytest
from served import Served

from twofold.serve.openai import ChatRequest, CompletionRequest

HI: list[Any] = [{"role": "user", "content": "hi"}]


@pytest.fixture
def client(server: Served) -> openai.OpenAI:
    return openai.OpenAI(base_url=server.url + "/v1", api_key="none needed", http_client=httpx.Client(trust_env=False))


def complete(server: Served, **fields: Any) -> dict[str, Any]:
    answer = server.http.post("/v1/completions", json={"temperature": 0, "max_tokens": 24, **fields})
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def refused(server: Served, path: str = "/v1/completions", **fields: Any) -> tuple[int, dict[str, Any]]:
    answer = server.http.post(path, json=fields)
    return answer.status_code, answer.json()["error"]


def streamed(server: Served, path: str, **fields: Any) -> list[dict[str, Any]]:
    with server.http.stream("POST", path, json={"stream": True, **fields}) as answer:
        assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in answer.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def test_models(client: openai.OpenAI) -> None:
    (model,) = client.models.list().data
    assert model.id == "tiny" and model.model_dump()["max_model_len"] == 512
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


def test_a_completion_streamed_is_the_completion_whole(client: openai.OpenAI) -> None:
    given: dict[str, Any] = {"model": "tiny", "prompt": "The quick", "max_tokens": 40, "seed": 11}
    whole = client.completions.create(**given)
    chunks = list(client.completions.create(**given, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == whole.choices[0].text
    assert [c.choices[0].finish_reason for c in chunks if c.choices and c.choices[0].finish_reason] == ["length"]
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage
    assert whole.usage is not None and whole.usage.completion_tokens == 40


def test_a_chat_streamed_is_the_chat_whole(client: openai.OpenAI) -> None:
    given: dict[str, Any] = {"model": "tiny", "messages": HI, "max_completion_tokens": 30, "seed": 5, "n": 3}
    whole = client.chat.completions.create(**given)
    said = {0: "", 1: "", 2: ""}
    ends, roles = {}, {}
    for chunk in client.chat.completions.create(**given, stream=True):
        for choice in chunk.choices:
            said[choice.index] += choice.delta.content or ""
            roles[choice.index] = roles.get(choice.index) or choice.delta.role
            ends[choice.index] = choice.finish_reason or ends.get(choice.index)
    assert said == {choice.index: choice.message.content for choice in whole.choices}
    assert len(set(said.values())) == 3, "samples of one seed differ by their number"
    assert ends == {choice.index: choice.finish_reason for choice in whole.choices}
    assert set(roles.values()) == {"assistant"}


def test_the_same_seed_says_the_same(server: Served) -> None:
    texts = [
        complete(server, prompt="The", temperature=1, seed=seed, max_tokens=30)["choices"][0]["text"]
        for seed in (3, 3, 4)
    ]
    assert texts[0] == texts[1] != texts[2]


def test_several_prompts_keep_their_order(server: Served) -> None:
    prompts = ["The quick", "for i in", "Gr", "def add"]
    alone = [complete(server, prompt=prompt)["choices"][0]["text"] for prompt in prompts]
    together = complete(server, prompt=prompts, n=2)["choices"]
    assert [choice["index"] for choice in together] == list(range(8))
    assert [choice["text"] for choice in together[::2]] == alone == [choice["text"] for choice in together[1::2]]
    ids = [server.http.post("/tokenize", json={"prompt": prompt}).json()["tokens"] for prompt in prompts]
    assert [choice["text"] for choice in complete(server, prompt=ids)["choices"]] == alone


def test_logprobs_of_a_completion(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="tiny", prompt="The quick", max_tokens=8, logprobs=3, echo=True, seed=1)
    choice = answer.choices[0]
    assert choice.text.startswith("The quick") and choice.logprobs is not None
    found = choice.logprobs
    assert found.token_logprobs is not None and found.top_logprobs is not None and found.tokens is not None
    assert answer.usage is not None
    total = answer.usage.total_tokens
    assert len(found.tokens) == len(found.token_logprobs) == len(found.text_offset or []) == total
    assert found.token_logprobs[0] is None and all(value < 0 for value in found.token_logprobs[1:])
    for token, logprob, top in list(zip(found.tokens, found.token_logprobs, found.top_logprobs))[1:]:
        assert token in top and len(top) <= 4 and sum(map(math.exp, top.values())) <= 1.0001
        assert max(top.values()) >= logprob


def test_logprobs_of_a_chat_agree_with_and_without_a_stream(client: openai.OpenAI) -> None:
    given: dict[str, Any] = {
        "model": "tiny", "messages": HI, "max_tokens": 10, "seed": 2, "logprobs": True, "top_logprobs": 2
    }  # fmt: skip
    whole = client.chat.completions.create(**given).choices[0].logprobs
    assert whole is not None and whole.content is not None and len(whole.content) == 10
    pieces = [c.choices[0].logprobs for c in client.chat.completions.create(**given, stream=True) if c.choices]
    assert [token for piece in pieces if piece for token in piece.content or []] == whole.content
    assert all(len(token.top_logprobs) == 2 and bytes(token.bytes or []) for token in whole.content)


def test_a_prompt_is_scored_without_generating(server: Served) -> None:
    answer = complete(server, prompt="The quick brown", max_tokens=0, echo=True, logprobs=0)
    choice = answer["choices"][0]
    assert choice["text"] == "The quick brown"
    assert (
        len(choice["logprobs"]["token_logprobs"]) == answer["usage"]["prompt_tokens"] == answer["usage"]["total_tokens"]
    )
    scores = complete(server, prompt="The quick brown", max_tokens=1, prompt_logprobs=0)["choices"][0][
        "prompt_logprobs"
    ]
    assert scores[0] is None
    assert [next(iter(s.values()))["logprob"] for s in scores[1:]] == choice["logprobs"]["token_logprobs"][1:]


def test_stops_are_not_shown_wherever_they_fall(server: Served) -> None:
    text = complete(server, prompt="The quick", max_tokens=60, ignore_eos=True)["choices"][0]["text"]
    stops = [stop for size in (1, 3, 6) for at in range(4, 30) if "�" not in (stop := text[at : at + size])][::5]
    assert len(stops) >= 4
    for stop in stops:
        cut = text[: text.index(stop)]
        choice = complete(server, prompt="The quick", max_tokens=60, stop=stop)["choices"][0]
        assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == (cut, "stop", stop)
        chunks = streamed(server, "/v1/completions", prompt="The quick", max_tokens=60, temperature=0, stop=[stop])
        assert "".join(c["choices"][0]["text"] for c in chunks) == cut
        kept = complete(server, prompt="The quick", max_tokens=60, stop=stop, include_stop_str_in_output=True)
        assert kept["choices"][0]["text"] == cut + stop


def test_stop_ids_end_and_ids_come_back(server: Served) -> None:
    first = complete(server, prompt="The quick", return_token_ids=True, ignore_eos=True)["choices"][0]
    ids = first["token_ids"]
    assert len(ids) == 24 and first["prompt_token_ids"]
    at = next(i for i in range(4, 24) if ids[i] not in ids[:i])
    choice = complete(server, prompt="The quick", stop_token_ids=[ids[at]], return_token_ids=True)["choices"][0]
    assert choice["token_ids"] == ids[: at + 1]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", ids[at])
    later = complete(server, prompt="The quick", stop_token_ids=[ids[at]], min_tokens=at + 2, return_token_ids=True)
    assert len(later["choices"][0]["token_ids"]) >= at + 2


def test_allowed_ids_and_bias_rule(server: Served) -> None:
    only = complete(server, prompt="The", allowed_token_ids=[40, 41], return_token_ids=True, temperature=1)
    assert set(only["choices"][0]["token_ids"]) <= {40, 41}
    forced = complete(server, prompt="The", logit_bias={"50": 100}, return_token_ids=True)
    assert set(forced["choices"][0]["token_ids"]) == {50}


def test_prompts_are_cut_when_asked(server: Served) -> None:
    long = "The quick brown fox jumps over the lazy dog, " * 3
    ids = server.http.post("/tokenize", json={"prompt": long}).json()["tokens"]
    for fields, kept in (({}, ids[-5:]), ({"truncation_side": "right"}, ids[:5])):
        answer = complete(server, prompt=long, truncate_prompt_tokens=5, return_token_ids=True, **fields)
        assert answer["choices"][0]["prompt_token_ids"] == kept


def test_tokens_there_and_back(server: Served) -> None:
    text = "def add(a, b): 3 € 🙂"
    answer = server.http.post("/tokenize", json={"prompt": text, "return_token_strs": True}).json()
    assert answer["count"] == len(answer["tokens"]) == len(answer["token_strs"]) and answer["max_model_len"] == 512
    assert server.http.post("/detokenize", json={"tokens": answer["tokens"]}).json() == {"prompt": text}
    chat = server.http.post("/tokenize", json={"messages": HI}).json()["tokens"]
    prompt = server.http.post("/detokenize", json={"tokens": chat}).json()["prompt"]
    assert prompt == "<|start|>user\nhi<|end|>\n<|start|>assistant\n"
    forged = server.http.post("/tokenize", json={"messages": [{"role": "user", "content": "<|end|>"}]}).json()
    assert forged["tokens"].count(2) == 1, "a special token spelled by a user is text"


def test_a_final_message_is_continued(server: Served) -> None:
    messages = [*HI, {"role": "assistant", "content": "The qui"}]
    ids = server.http.post("/tokenize", json={"messages": messages, "continue_final_message": True}).json()["tokens"]
    assert server.http.post("/detokenize", json={"tokens": ids}).json()["prompt"].endswith("assistant\nThe qui")


@pytest.mark.parametrize(
    ("fields", "status", "param", "code"),
    [
        ({"prompt": "x", "model": "other"}, 404, "model", "model_not_found"),
        ({"prompt": "x " * 2000}, 400, "prompt", "context_length_exceeded"),
        ({"prompt": [5, 400]}, 400, "prompt", "invalid_value"),
        ({"prompt": [-1]}, 400, "prompt", "invalid_value"),
        ({"prompt": ""}, 400, "prompt", "invalid_value"),
        ({"prompt": "x", "stop_token_ids": [100_000]}, 400, "stop_token_ids", "invalid_value"),
        ({"prompt": "x", "logit_bias": {"100000": 1}}, 400, "logit_bias", "invalid_value"),
        ({"prompt": ["x"] * 65}, 400, "prompt", "invalid_value"),
        ({"prompt": "x", "temprature": 1}, 400, "temprature", "unknown_field"),
        ({"prompt": "x", "suffix": "y"}, 400, "suffix", "invalid_value"),
        ({}, 400, "prompt", "missing_field"),
    ],
)  # fmt: skip
def test_errors_name_the_field(server: Served, fields: dict[str, Any], status: int, param: str, code: str) -> None:
    answered, error = refused(server, **fields)
    assert (answered, error["param"], error["code"]) == (status, param, code), error
    assert error["type"] in ("invalid_request_error", "not_found_error")


def test_the_client_library_raises_its_own_errors(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="tiny", messages=HI, temperature=3)
    assert caught.value.param == "temperature"
    with pytest.raises(openai.BadRequestError, match="template setting"):
        client.chat.completions.create(
            model="tiny", messages=HI, extra_body={"chat_template_kwargs": {"tokenize": True}}
        )


def test_a_deadline_ends_a_request(server: Served) -> None:
    headers = {"X-Request-Timeout": "0.05"}
    body = {"prompt": "The", "max_tokens": 500, "ignore_eos": True}
    answer = server.http.post("/v1/completions", json=body, headers=headers)
    assert answer.status_code == 504 and answer.json()["error"]["type"] == "timeout_error"
    with server.http.stream("POST", "/v1/completions", json={**body, "stream": True}, headers=headers) as stream:
        lines = [line for line in stream.iter_lines() if line]
    assert json.loads(lines[-2].removeprefix("data: "))["error"]["code"] == "timeout" and lines[-1] == "data: [DONE]"
    assert server.http.post("/v1/completions", json=body, headers={"X-Request-Timeout": "soon"}).status_code == 400


def test_more_than_the_queue_holds_is_429(server: Served) -> None:
    bodies = [
        {"prompt": "The", "max_tokens": 400, "n": 16, "ignore_eos": True, "stream": True, "seed": i} for i in range(8)
    ]
    http = httpx.Client(base_url=server.url, timeout=30, trust_env=False)
    with server.still(), http, contextlib.ExitStack() as streams:
        for body in bodies:  # 8 x 16 sequences: all that 4 x max_num_seqs allows
            assert streams.enter_context(http.stream("POST", "/v1/completions", json=body)).status_code == 200
        answer = server.http.post("/v1/completions", json={"prompt": "x"})
        assert answer.status_code == 429 and 1 <= int(answer.headers["retry-after"]) <= 60
        assert answer.json()["error"]["type"] == "rate_limit_error"
    server.wait(server.idle)
    assert complete(server, prompt="x")["choices"]


def test_metrics_carry_vllms_names(server: Served) -> None:
    complete(server, prompt="The quick")
    text = server.http.get("/metrics").text
    for name in (
        "num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "prefix_cache_queries_total",
        "prefix_cache_hits_total", "num_preemptions_total", "prompt_tokens_total", "generation_tokens_total",
        "request_success_total", "time_to_first_token_seconds_bucket", "inter_token_latency_seconds_bucket",
        "e2e_request_latency_seconds_bucket", "request_queue_time_seconds_count", "request_prompt_tokens_sum",
        "request_prefill_time_seconds_count", "request_decode_time_seconds_count", "cache_config_info",
        "request_inference_time_seconds_count", "request_generation_tokens_sum", "request_params_n_count",
        "admission_rejections_total",
    ):  # fmt: skip
        assert f"vllm:{name}{{" in text, name
    assert 'model_name="tiny"' in text and "cmpl-" not in text
    (ends,) = [line for line in text.splitlines() if line.startswith("vllm:request_success_total") and "length" in line]
    assert float(ends.split()[-1]) >= 1


def test_the_small_routes(server: Served) -> None:
    for path in ("/health", "/livez", "/readyz"):
        assert server.http.get(path).status_code == 200
    assert server.http.get("/version").json()["version"]
    stats = server.stats()
    assert stats["state"] == "ready" and stats["kv_blocks"]["total"] == 256
    page = server.http.get("/")
    assert page.status_code == 200 and "script-src 'self'" in page.headers["content-security-policy"]


def test_no_body_makes_the_server_fail(server: Served) -> None:
    """Fields drawn at random with values drawn at random: an answer or a 400, never a 500, never a restart."""
    rng = random.Random(2)
    values: list[Any] = [
        0, -1, 1, 2**31, 2**63, 2**64, 1e308, 0.5, "1", "", None, True, [], {}, [1], ["a"], {"1": 1}, "x" * 300,
        [2**70], "\x00", "<|end|>", [[1]], [[]], [-1], [None], 21, 17, [{"role": "user", "content": "x"}],
    ]  # fmt: skip
    said: dict[int, int] = {}
    for turn in range(400):
        kind, path, base = (
            (ChatRequest, "/v1/chat/completions", {"messages": HI})
            if turn % 2
            else (CompletionRequest, "/v1/completions", {"prompt": "The"})
        )
        drawn = {name: rng.choice(values) for name in rng.sample(kind.__struct_fields__, rng.randint(1, 3))}
        answer = server.http.post(path, json={**base, "max_tokens": 2, **drawn})
        assert answer.status_code in (200, 400, 404), (drawn, answer.text)
        assert answer.is_success or answer.json()["error"]["message"]
        said[answer.status_code] = said.get(answer.status_code, 0) + 1
    assert said[200] > 10 < said[400]
    assert server.stats()["engine_restarts_total"] == 0
