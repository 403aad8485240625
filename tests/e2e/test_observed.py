"""What a server tells of its requests: timings in the answer, /requests, JSON lines, and `twofold explain`."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from served import ROOT, Served, served

ENGINE = [sys.executable, str(ROOT / "tests" / "unit" / "fake_engine.py")]
SECRET = "xylophone"
KEYS = ("open-sesame", "other-sesame")
TRACE = "0af7651916cd43dd8448eb211c80319c"
PARTS = ("front_seconds", "queue_seconds", "prefill_seconds", "decode_seconds")


@pytest.fixture(scope="module")
def watched(tiny: Path) -> Iterator[Served]:
    """An engine that is a hash, behind the whole server: keys, JSON lines."""
    with served(tiny, command=ENGINE, api_keys=KEYS, log="json", limits={"records": 12}) as server:
        server.http.headers["authorization"] = f"Bearer {KEYS[0]}"
        yield server


def ask(server: Served, path: str = "/v1/completions", headers: dict[str, str] | None = None, **body: Any) -> Any:
    given = {"prompt": SECRET, "max_tokens": 6} if path == "/v1/completions" else {}
    answer = server.http.post(path, json={"model": "tiny", **given, **body}, headers=headers)
    assert answer.status_code == 200, answer.text
    return answer


def events(answer: httpx.Response) -> list[dict[str, Any]]:
    lines = [line.removeprefix("data: ") for line in answer.text.splitlines() if line.startswith("data: {")]
    return [json.loads(line) for line in lines]


def check(timings: dict[str, Any]) -> None:
    assert sum(timings[part] for part in PARTS) == pytest.approx(timings["total_seconds"], abs=1e-4)
    assert 0 < timings["first_token_seconds"] <= timings["total_seconds"]
    assert timings["decode_seconds"] > 0 and timings["tokens_per_second"] > 0
    assert (timings["preemptions"], timings["restarts"], timings["drafted_tokens"]) == (0, 0, 0)


CHAT = [{"role": "user", "content": SECRET}]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": SECRET, "max_tokens": 6}),
        ("/v1/chat/completions", {"messages": CHAT, "max_tokens": 6}),
        ("/v1/responses", {"input": SECRET, "max_output_tokens": 16}),
        ("/v1/messages", {"messages": CHAT, "max_tokens": 6}),
        ("/inference/v1/generate", {"token_ids": [1, 2, 3], "sampling_params": {"max_tokens": 6}}),
    ],
)
def test_every_api_says_where_the_time_went_when_asked(watched: Served, path: str, body: dict[str, Any]) -> None:
    usage = ask(watched, path, **body, timings=True).json()["usage"]
    check(usage["timings"])
    assert "timings" not in ask(watched, path, **body).json()["usage"]
    found = [
        event for event in events(ask(watched, path, **body, timings=True, stream=True)) if "timings" in str(event)
    ]
    told = [event.get("usage") or event["response"]["usage"] for event in found]
    assert len(told) == 1
    check(told[0]["timings"])


def test_only_the_last_usage_of_a_stream_has_timings(watched: Served) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    told = [event["usage"] for event in events(ask(watched, stream=True, stream_options=options, timings=True))]
    assert len(told) > 3
    assert ["timings" in usage for usage in told] == [False] * (len(told) - 1) + [True]


def test_a_request_is_remembered_without_its_words(watched: Served) -> None:
    answer = ask(watched, headers={"x-request-id": "ab-12"}, stop=["never said"], temperature=0.5, seed=7, n=2)
    for name in ("ab-12", answer.json()["id"]):
        told = watched.http.get(f"/requests/{name}")
        found = told.json()
        assert (found["state"], found["status"], found["finish_reasons"]) == ("finished", 200, ["length"])
        assert (found["output_tokens"], len(found["sequences"])) == (12, 2)
        assert found["settings"] == {"temperature": 0.5, "seed": 7, "n": 2, "max_tokens": 6, "stop": 1}
        assert SECRET not in told.text and "never said" not in told.text


def test_the_list_is_newest_first_bounded_and_ones_own(watched: Served) -> None:
    for number in range(14):
        ask(watched, headers={"x-request-id": f"run-{number}"})
    found = watched.http.get("/requests").json()
    assert [one["id"] for one in found["data"]] == [f"run-{number}" for number in range(13, 1, -1)]
    page = watched.http.get("/requests?limit=2&state=finished").json()
    assert [one["id"] for one in page["data"]] == ["run-13", "run-12"] and page["has_more"]
    other = {"authorization": f"Bearer {KEYS[1]}"}
    assert watched.http.get("/requests", headers=other).json()["data"] == []
    assert watched.http.get("/requests/run-13", headers=other).status_code == 404


@pytest.mark.parametrize("query", ["limit=0", "limit=-1", "limit=x", "limit=1e9", "limit=9999999", "state=gone"])
def test_a_bad_query_is_refused(watched: Served, query: str) -> None:
    assert watched.http.get(f"/requests?{query}").status_code == 400


@pytest.mark.parametrize("query", ["from=-1", "from=x", "from=99999999999999999", "from=%00"])
def test_a_bad_place_in_history_is_refused(watched: Served, query: str) -> None:
    assert watched.http.get(f"/history?{query}").status_code == 400


def test_an_unknown_id_is_answered_with_the_nearest(watched: Served) -> None:
    ask(watched, headers={"x-request-id": "invoice-2024"})
    answer = watched.http.get("/requests/invoice-2O24")
    assert answer.status_code == 404 and "invoice-2024" in answer.json()["error"]["message"]
    assert watched.http.get("/requests/" + "%2e%2e/" * 5 + "x" * 900).status_code == 404


def lines(server: Served, name: str) -> list[dict[str, Any]]:
    server.wait(lambda: any(f'"{name}"' in line and "request finished" in line for line in server.log))
    return [found for line in server.log if (found := json.loads(line)).get("request_id") == name]


def test_a_finished_request_is_one_line_of_json(watched: Served) -> None:
    parent = f"00-{TRACE}-b7ad6b7169203331-01"
    ask(watched, headers={"x-request-id": "logged-1", "traceparent": parent}, stop=["never said"])
    found = lines(watched, "logged-1")
    (line,) = [one for one in found if one["message"] == "request finished"]
    assert (line["status"], line["model"], line["finish"], line["output_tokens"]) == (200, "tiny", "length", 6)
    assert sum(line[part] for part in PARTS) == pytest.approx(line["total_seconds"], abs=1e-4)
    assert {one["trace_id"] for one in found} == {TRACE}
    assert not any(SECRET in text or "never said" in text or KEYS[0] in text for text in watched.log)


def test_a_client_that_leaves_is_told_as_499(watched: Served) -> None:
    body = {"model": "tiny", "prompt": "x", "max_tokens": 400, "stream": True}
    with watched.http.stream("POST", "/v1/completions", json=body, headers={"x-request-id": "gone-1"}) as answer:
        parts = answer.iter_bytes()
        next(parts)
        watched.worker.suspend()
        assert watched.http.get("/requests/gone-1").json()["state"] == "running"
    watched.worker.resume()
    watched.wait(lambda: watched.http.get("/requests/gone-1").json()["state"] == "finished")
    assert watched.http.get("/requests/gone-1").json()["status"] == 499


def test_history_has_a_row_every_few_seconds(watched: Served) -> None:
    ask(watched)
    watched.wait(lambda: sum(row["finished"] for row in watched.http.get("/history").json()["rows"]) > 0)
    found = watched.http.get("/history").json()
    assert (found["model"], found["models"], found["state"]) == ("tiny", ["tiny"], "ready")
    rows = found["rows"]
    busy = next(row for row in rows if row["first_p50"] is not None)
    assert 0 < busy["first_p50"] <= busy["first_p95"] and 0 < busy["between_p50"] <= busy["between_p95"]
    after = watched.http.get(f"/history?from={found['from'] + len(rows)}").json()
    assert after["from"] >= found["from"] + len(rows) and len(after["rows"]) <= 1


def explain(server: Served, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "twofold", "explain", *words, "--url", server.url]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TWOFOLD_API_KEY": KEYS[0]}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)


def test_explain_draws_the_time_and_says_why(watched: Served) -> None:
    ask(watched, headers={"x-request-id": "told-77"}, temperature=0.25)
    told = explain(watched, "told-77")
    assert told.returncode == 0, told.stderr
    assert "told-77: 200 (length)" in told.stdout and "temperature 0.25" in told.stdout
    for part in ("front", "queue", "prefill", "decode"):
        assert re.search(rf"^{part} .*│.*│ +[\d.]+ m?s +\d+%", told.stdout, re.M), told.stdout
    listed = explain(watched)
    assert listed.returncode == 0 and "told-77" in listed.stdout.splitlines()[0]
    wrong = explain(watched, "told-78")
    assert wrong.returncode == 2 and "told-77" in wrong.stderr and len(wrong.stderr.splitlines()) == 1


def test_timings_tell_of_a_process_that_died(tiny: Path) -> None:
    with served(tiny, command=ENGINE, timings=True) as server:
        answers: list[httpx.Response] = []
        body = {"prompt": "x", "max_tokens": 300}
        asking = threading.Thread(target=lambda: answers.append(server.http.post("/v1/completions", json=body)))
        asking.start()
        server.wait(lambda: any(row["output_tokens"] > 3 for row in server.stats()["requests"]))
        os.kill(server.worker.pid, signal.SIGKILL)
        asking.join(30)
        timings = answers[0].json()["usage"]["timings"]
        assert timings["restarts"] == 1 and timings["waits"]["restart"] > 0
        told = explain(server)
        name = told.stdout.split()[1]
        assert "died under it once" in explain(server, name).stdout


def test_a_refusal_is_remembered(tiny: Path) -> None:
    with served(tiny, command=ENGINE, limits={"queue_requests": 1}) as server:
        body = {"prompt": "x", "max_tokens": 400}
        asking = threading.Thread(target=lambda: server.http.post("/v1/completions", json=body))
        asking.start()
        server.wait(lambda: server.stats()["requests"])
        answer = server.http.post("/v1/completions", json=body, headers={"x-request-id": "late-1"})
        assert answer.status_code == 429
        assert server.http.get("/requests/late-1").json()["status"] == 429
        assert "the queue was full" in explain(server, "late-1").stdout
        asking.join(30)


def test_a_real_engine_says_why_a_request_waited(tiny: Path) -> None:
    with served(tiny, engine={"max_num_seqs": 1}) as server:
        body = {"prompt": "one two three", "max_tokens": 400, "ignore_eos": True}
        first = threading.Thread(target=lambda: server.http.post("/v1/completions", json=body))
        first.start()
        server.wait(lambda: server.stats()["running"])
        timings = server.http.post("/v1/completions", json={**body, "max_tokens": 4, "timings": True}).json()["usage"][
            "timings"
        ]
        first.join(30)
        assert timings["waits"]["seats"] == pytest.approx(timings["queue_seconds"], rel=0.5, abs=0.1)
        time.sleep(0.05)
        assert "as many requests ran" in explain(server, server.http.get("/requests").json()["data"][0]["id"]).stdout
