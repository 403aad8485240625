"""Embeddings, scores, rankings and labels over real processes: the openai client, and what it does not show."""

from __future__ import annotations

import base64
import json
import math
import threading
from array import array
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from served import Served, served

from tests.parity.sentence_checkpoint import TEXTS, decoder, encoder, sentences

ROUTES = {
    "/v1/embeddings": {"input": "a fox"},
    "/pooling": {"input": "a fox"},
    "/classify": {"input": "a fox"},
    "/v1/classify": {"input": "a fox"},
    "/score": {"text_1": "a fox", "text_2": "a dog"},
    "/v1/score": {"text_1": "a fox", "text_2": "a dog"},
    "/rerank": {"query": "a fox", "documents": ["a dog"]},
    "/v1/rerank": {"query": "a fox", "documents": ["a dog"]},
    "/v2/rerank": {"query": "a fox", "documents": ["a dog"]},
}


@pytest.fixture(scope="module")
def embedder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("embedder")
    encoder(folder, "bert")
    sentences(folder, "mean_tokens", prompts={"query": "find: "}, default_prompt_name=None)
    with served(folder, limits={"texts": 40, "queue_requests": 60}) as server:
        yield server


@pytest.fixture(scope="module")
def crosser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("crosser")
    encoder(folder, "bert-cross")
    with served(folder) as server:
        yield server


@pytest.fixture(scope="module")
def speaker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("speaker")
    decoder(folder)
    with served(folder, engine={"convert": "embed"}) as server:
        yield server


def ask(server: Served, path: str, **fields: Any) -> dict[str, Any]:
    answer = server.http.post(path, json=fields)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def refused(server: Served, path: str, **fields: Any) -> dict[str, Any]:
    answer = server.http.post(path, json=fields)
    assert answer.status_code == 400, answer.text
    error: dict[str, Any] = answer.json()["error"]
    return error


def numbers(text: str) -> list[float]:
    return array("f", base64.b64decode(text)).tolist()


def test_the_openai_client(embedder: Served) -> None:
    client = openai.OpenAI(base_url=embedder.url + "/v1", api_key="-", http_client=httpx.Client(trust_env=False))
    found = client.embeddings.create(model="tiny", input=TEXTS)  # asks for base64, and decodes it
    floats = client.embeddings.create(model="tiny", input=TEXTS, encoding_format="float")
    assert [one.index for one in found.data] == [0, 1, 2, 3]
    assert [one.embedding for one in found.data] == [one.embedding for one in floats.data]
    assert all(math.isclose(sum(x * x for x in one.embedding), 1.0, rel_tol=1e-5) for one in found.data)
    assert found.usage.prompt_tokens == found.usage.total_tokens > 30
    cut = client.embeddings.create(model="tiny", input=TEXTS[0], dimensions=8, user="me")
    assert len(cut.data[0].embedding) == 8
    with pytest.raises(openai.BadRequestError, match="1 to 40"):
        client.embeddings.create(model="tiny", input=TEXTS[0], dimensions=41)
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model="other", input=TEXTS[0])


def test_texts_ids_and_lists_of_them_are_the_same(embedder: Served) -> None:
    ids = ask(embedder, "/tokenize", prompt=TEXTS[0])["tokens"]
    by_text = ask(embedder, "/v1/embeddings", input=TEXTS[0])
    for given in ([TEXTS[0]], ids, [ids]):
        assert ask(embedder, "/v1/embeddings", input=given)["data"] == by_text["data"]
    bare = ask(embedder, "/v1/embeddings", input=TEXTS[0], add_special_tokens=False)
    assert bare["usage"]["prompt_tokens"] == len(ids) - 2 and bare["data"] != by_text["data"]


def test_a_spelled_special_token_is_text(embedder: Served) -> None:
    spelled = ask(embedder, "/v1/embeddings", input="a fox [SEP] a dog")["usage"]["prompt_tokens"]
    assert spelled > ask(embedder, "/v1/embeddings", input="a fox a dog")["usage"]["prompt_tokens"] + 1


def test_long_texts(embedder: Served) -> None:
    long = "fox " * 300
    error = refused(embedder, "/v1/embeddings", input=["fox", long])
    assert error["code"] == "context_length_exceeded" and "160" in error["message"]
    assert ask(embedder, "/v1/embeddings", input=long, truncate_prompt_tokens=-1)["usage"]["prompt_tokens"] == 160
    cut = ask(embedder, "/v1/embeddings", input=long, truncate_prompt_tokens=5)
    assert cut["data"] == ask(embedder, "/v1/embeddings", input="fox fox fox")["data"]
    assert "hold no more" in refused(embedder, "/v1/embeddings", input=long, truncate_prompt_tokens=2)["message"]


def test_pooling_is_raw(embedder: Served) -> None:
    (one,) = ask(embedder, "/pooling", input="a fox")["data"]
    assert one["object"] == "pooling" and {len(row) for row in one["data"]} == {40}
    (packed,) = ask(embedder, "/pooling", input="a fox", encoding_format="base64")["data"]
    assert numbers(packed["data"]) == [x for row in one["data"] for x in row]
    (vector,) = ask(embedder, "/pooling", input="a fox", task="embed", normalize=False)["data"]
    mean = [sum(column) / len(one["data"]) for column in zip(*one["data"], strict=True)]
    assert vector["data"] == pytest.approx(mean, abs=1e-5)


def test_scores_and_rankings_of_vectors(embedder: Served) -> None:
    vectors = [one["embedding"] for one in ask(embedder, "/v1/embeddings", input=TEXTS)["data"]]
    cosines = [sum(a * b for a, b in zip(vectors[0], other, strict=True)) for other in vectors]
    scores = ask(embedder, "/score", text_1=TEXTS[0], text_2=TEXTS)["data"]
    assert [one["score"] for one in scores] == pytest.approx(cosines, abs=1e-5)
    ranked = ask(embedder, "/rerank", query=TEXTS[0], documents=[TEXTS[2], {"text": TEXTS[0]}, TEXTS[1]], top_n=2)
    assert ranked["results"][0]["index"] == 1 and len(ranked["results"]) == 2
    assert ranked["results"][0]["document"] == {"text": TEXTS[0]}
    assert ranked["results"][0]["relevance_score"] == pytest.approx(1.0, abs=1e-5)
    assert "document" not in ask(embedder, "/v2/rerank", query="a", documents=["b"])["results"][0]
    assert "document" not in ask(embedder, "/rerank", query="a", documents=["b"], return_documents=False)["results"][0]


def test_a_cross_encoder(crosser: Served) -> None:
    lone = [ask(crosser, "/v1/score", text_1=TEXTS[0], text_2=text)["data"][0]["score"] for text in TEXTS]
    assert [one["score"] for one in ask(crosser, "/score", text_1=TEXTS[0], text_2=TEXTS)["data"]] == lone
    assert all(0 < score < 1 for score in lone)
    raw = ask(crosser, "/score", text_1=TEXTS[0], text_2=TEXTS[1], use_activation=False)["data"][0]["score"]
    assert 1 / (1 + math.exp(-raw)) == pytest.approx(lone[1], abs=1e-6)
    ranked = ask(crosser, "/v1/rerank", query=TEXTS[0], documents=TEXTS)["results"]
    assert [one["relevance_score"] for one in ranked] == sorted(lone, reverse=True)
    assert [TEXTS.index(one["document"]["text"]) for one in ranked] == [one["index"] for one in ranked]
    (label,) = ask(crosser, "/classify", input=TEXTS[0])["data"]
    assert label["label"] == "LABEL_0" and label["num_classes"] == len(label["probs"]) == 1
    assert "not embed" in refused(crosser, "/v1/embeddings", input="a fox")["message"]
    assert ask(crosser, "/pooling", input="a fox", use_activation=False)["data"][0]["data"]


def test_an_encoder_makes_no_text(embedder: Served) -> None:
    for path, fields in (
        ("/v1/completions", {"prompt": "a fox"}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a fox"}]}),
    ):
        refused(embedder, path, **fields)
    assert "no text" in refused(embedder, "/v1/completions", prompt="a fox")["message"]
    assert embedder.idle()


def test_a_generating_model_does_both_when_asked(speaker: Served) -> None:
    found: dict[str, Any] = {}

    def generate() -> None:
        found.update(ask(speaker, "/v1/completions", prompt="the fox", max_tokens=100, temperature=0, ignore_eos=True))

    thread = threading.Thread(target=generate)
    thread.start()
    vectors = [ask(speaker, "/v1/embeddings", input=TEXTS)["data"] for _ in range(5)]
    thread.join()
    assert all(vector == vectors[0] for vector in vectors) and len(vectors[0]) == 4
    assert found["usage"]["completion_tokens"] == 100


def test_a_generating_model_says_how_it_would(server: Served) -> None:
    for path, fields in ROUTES.items():
        assert "--convert embed" in refused(server, path, **fields)["message"]


@pytest.mark.parametrize("path", ROUTES)
def test_hostile_bodies_are_refused(embedder: Served, path: str) -> None:
    good = ROUTES[path]
    bodies: list[Any] = [None, 5, [], "x", {}, good | {"nonsense": 1}, good | {"priority": 2**40}]
    bodies += [good | {"truncate_prompt_tokens": 0}, good | {"request_id": ""}, good | {"model": 3}]
    for field in good:
        wrong: list[Any] = [None, "", [], {}, 7, [[]], [""], [1, "a"], ["a"] * 41, [[1], "a"], [2**70], [-1]]
        wrong += ["\ud800", ["a", None], [["a"]]]
        bodies += [good | {field: value} for value in wrong]
    for body in bodies:
        content = json.dumps(body)
        answer = embedder.http.post(path, content=content, headers={"content-type": "application/json"})
        assert 400 <= answer.status_code < 500 or answer.status_code == 200, (body, answer.text)
        valid = {"/v1/embeddings", "/pooling"} & {path} or "lassify" not in path
        assert answer.status_code != 200 or (valid and body not in (None, {}, [])), body
    embedder.wait(embedder.idle)


def test_limits_and_leaving(embedder: Served) -> None:
    assert "1 to 40" in refused(embedder, "/v1/embeddings", input=["a"] * 41)["message"]
    body = {"input": ["fox " * 150] * 40}
    embedder.worker.suspend()
    try:
        with pytest.raises(httpx.TimeoutException):
            httpx.post(embedder.url + "/v1/embeddings", json=body, timeout=0.4, trust_env=False)
        embedder.wait(lambda: not embedder.stats()["requests"])  # it left, and its texts with it
        answers: list[int] = []
        thread = threading.Thread(target=lambda: answers.append(embedder.http.post("/pooling", json=body).status_code))
        thread.start()
        embedder.wait(lambda: embedder.stats()["requests"])
        full = httpx.post(embedder.url + "/v1/embeddings", json=body, trust_env=False)
        assert full.status_code == 429 and int(full.headers["retry-after"]) >= 1
        late = httpx.post(
            embedder.url + "/v1/embeddings",
            json={"input": "fox"},
            headers={"x-request-timeout": "0.1"},
            timeout=10,
            trust_env=False,
        )
        assert late.status_code == 504
    finally:
        embedder.worker.resume()
    thread.join()
    assert answers == [200]
    embedder.wait(embedder.idle)
    text = embedder.http.get("/metrics").text
    assert 'finished_reason="stop"' in text and 'finished_reason="abort"' in text


def test_a_dead_process_is_started_again_and_texts_are_read(embedder: Served) -> None:
    before = ask(embedder, "/v1/embeddings", input=TEXTS)["data"]
    embedder.worker.suspend()
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(ask(embedder, "/v1/embeddings", input=TEXTS)["data"]))
    thread.start()
    embedder.wait(lambda: embedder.stats()["requests"])
    embedder.worker.kill()
    thread.join()
    assert found == [before]
