"""Files and batches over real processes: the openai client, errors line by line, and deaths in the middle."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from served import ROOT, Served, served

from twofold.core import ConfigError
from twofold.engine.config import EngineConfig
from twofold.serve.batches.offline import answer_file
from twofold.serve.batches.shapes import Counts
from twofold.serve.config import ServeConfig

Row = dict[str, Any]
CHAT = "/v1/chat/completions"
ENGINE = [sys.executable, str(ROOT / "tests" / "unit" / "fake_engine.py")]


@pytest.fixture
def client(server: Served) -> openai.OpenAI:
    return of(server)


def of(server: Served, key: str = "none needed") -> openai.OpenAI:
    return openai.OpenAI(base_url=server.url + "/v1", api_key=key, http_client=httpx.Client(trust_env=False))


def line(name: str, url: str = CHAT, **body: Any) -> Row:
    prompt = {CHAT: {"messages": [{"role": "user", "content": name}]}, "/v1/responses": {"input": name}}.get(url)
    most = "max_output_tokens" if url == "/v1/responses" else "max_tokens"
    given = {"model": "tiny", most: 5, "temperature": 0, **(prompt or {"prompt": name}), **body}
    return {"custom_id": name, "method": "POST", "url": url, "body": given}


def jsonl(rows: list[Row]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def begin(client: openai.OpenAI, rows: list[Row] | bytes, url: Any = CHAT, window: Any = "24h") -> Any:
    data = rows if isinstance(rows, bytes) else jsonl(rows)
    file = client.files.create(file=("in.jsonl", data), purpose="batch")
    return client.batches.create(input_file_id=file.id, endpoint=url, completion_window=window, metadata={"a": "b"})


def finish(client: openai.OpenAI, batch: Any, seconds: float = 30) -> Any:
    deadline = time.monotonic() + seconds
    while batch.status not in ("completed", "failed", "expired", "cancelled"):
        assert time.monotonic() < deadline, batch
        time.sleep(0.02)
        batch = client.batches.retrieve(batch.id)
    return batch


def rows(client: openai.OpenAI, file: str | None) -> list[Row]:
    return [json.loads(each) for each in client.files.content(file).text.splitlines()] if file else []


@pytest.mark.parametrize("url", [CHAT, "/v1/completions", "/v1/responses"])
def test_a_batch_answers_as_the_route_does(client: openai.OpenAI, server: Served, url: str) -> None:
    batch = begin(client, [line(f"q{n}", url) for n in range(6)], url)
    assert (batch.status, batch.endpoint, batch.metadata) == ("validating", url, {"a": "b"})
    batch = finish(client, batch)
    assert batch.status == "completed" and batch.error_file_id is None and batch.model == "tiny"
    assert (batch.request_counts.total, batch.request_counts.completed, batch.request_counts.failed) == (6, 6, 0)
    found = {row["custom_id"]: row for row in rows(client, batch.output_file_id)}
    assert set(found) == {f"q{n}" for n in range(6)}
    for name, row in found.items():
        alone = server.http.post(url, json=line(name, url)["body"]).json()
        said = row["response"]["body"]
        assert row["error"] is None and row["response"]["status_code"] == 200
        key = "output" if url == "/v1/responses" else "choices"
        assert _plain(said[key]) == _plain(alone[key])
    assert batch.usage.output_tokens == 30 and batch.usage.input_tokens > 6


def _plain(value: Any) -> Any:
    """Without ids, which differ."""
    if isinstance(value, list):
        return [_plain(each) for each in value]
    return {k: _plain(v) for k, v in value.items() if k != "id"} if isinstance(value, dict) else value


def test_a_wrong_line_is_an_error_of_its_own(client: openai.OpenAI) -> None:
    given = [
        line("good"), line("hot", temperature=9), line("other", model="other"), line("odd", nothing=1),
        line("streamed", stream=True), {**line("empty"), "body": {}},
    ]  # fmt: skip
    batch = finish(client, begin(client, given))
    assert batch.status == "completed" and batch.request_counts.failed == 5
    assert [row["custom_id"] for row in rows(client, batch.output_file_id)] == ["good"]
    wrong = {row["custom_id"]: row["response"] for row in rows(client, batch.error_file_id)}
    assert {name: answer["status_code"] for name, answer in wrong.items()} == {
        "hot": 400, "other": 404, "odd": 400, "streamed": 400, "empty": 400
    }  # fmt: skip
    assert wrong["hot"]["body"]["error"]["param"] == "temperature"


@pytest.mark.parametrize(
    ("data", "code", "number"),
    [
        (b"", "empty_file", None),
        (b"{}\n", "invalid_json_line", 1),
        (jsonl([line("a")]) + b"nonsense\n", "invalid_json_line", 2),
        (jsonl([line("a"), line("a")]), "duplicate_custom_id", 2),
        (jsonl([line("a", "/v1/completions")]), "invalid_url", 1),
        (jsonl([{**line("a"), "method": "GET"}]), "invalid_method", 1),
        (jsonl([line("")]), "invalid_custom_id", 1),
        (b"\xff\xfe" + jsonl([line("a")]), "invalid_json_line", 1),
        (b"[" * 10_000 + b"\n", "invalid_json_line", 1),
    ],
)
def test_a_file_that_is_no_batch_fails_as_a_whole(client: openai.OpenAI, data: bytes, code: str, number: int) -> None:
    batch = finish(client, begin(client, data))
    assert batch.status == "failed" and batch.output_file_id is None
    assert (batch.errors.data[0].code, batch.errors.data[0].line) == (code, number)


def test_a_batch_is_cancelled_with_what_it_has(client: openai.OpenAI, server: Served) -> None:
    batch = begin(client, [line(f"q{n}", max_tokens=300, ignore_eos=True) for n in range(60)])
    server.wait(lambda: client.batches.retrieve(batch.id).request_counts.completed > 0)
    stopped = client.batches.cancel(batch.id)
    assert stopped.status == "cancelling"
    stopped = finish(client, stopped)
    assert stopped.status == "cancelled"
    good, bad = rows(client, stopped.output_file_id), rows(client, stopped.error_file_id)
    assert Counter(row["custom_id"] for row in good + bad) == Counter(f"q{n}" for n in range(60))
    assert good and {row["error"]["code"] for row in bad} == {"batch_cancelled"}


def test_a_window_that_is_over_ends_a_batch(client: openai.OpenAI) -> None:
    given = [line(f"q{n}", max_tokens=400, ignore_eos=True) for n in range(100)]
    batch = finish(client, begin(client, given, window="1s"))
    assert batch.status == "expired" and batch.expired_at
    good, bad = rows(client, batch.output_file_id), rows(client, batch.error_file_id)
    assert Counter(row["custom_id"] for row in good + bad) == Counter(f"q{n}" for n in range(100))
    assert {row["error"]["code"] for row in bad} == {"batch_expired"}


def test_whoever_comes_while_a_batch_runs_is_served_first(client: openai.OpenAI, server: Served) -> None:
    batch = begin(client, [line(f"q{n}", max_tokens=200, ignore_eos=True) for n in range(80)])
    server.wait(lambda: server.stats()["running"] >= 10)
    for _ in range(5):
        answer = server.http.post(CHAT, json=line("now")["body"])
        assert answer.status_code == 200
        assert server.stats()["running"] <= 17  # half of 32 places, and the one who came
    assert client.batches.retrieve(batch.id).status == "in_progress"
    client.batches.cancel(batch.id)


def test_files_are_listed_read_and_deleted(client: openai.OpenAI) -> None:
    data = jsonl([line("a")]) * 50
    made = [client.files.create(file=(f"../{n}.jsonl", data), purpose="batch") for n in range(3)]
    assert made[0].filename == "../0.jsonl" and made[0].bytes == len(data)
    assert [file.id for file in client.files.list(limit=2)][:3] == [file.id for file in made[::-1]]  # pages of two
    assert client.files.content(made[1].id).read() == data
    assert client.files.retrieve(made[1].id) == made[1]
    for file in made:
        assert client.files.delete(file.id).deleted
    with pytest.raises(openai.NotFoundError):
        client.files.content(made[1].id)
    with pytest.raises(openai.BadRequestError):
        client.batches.create(input_file_id=made[1].id, endpoint=CHAT, completion_window="24h")


@pytest.mark.parametrize(
    ("fields", "data", "status"),
    [
        ({"purpose": "fine-tune"}, b"x", 400),
        ({}, b"x", 400),
        ({"purpose": "batch"}, None, 400),
        ({"purpose": "batch", "more": "x"}, b"x", 400),
        ({"purpose": "b" * 5000}, b"x", 400),
        ({"purpose": "batch", "expires_after[anchor]": "created_at"}, b"x", 400),
        ({"purpose": "batch", "expires_after[anchor]": "created_at", "expires_after[seconds]": "3600"}, b"x", 200),
    ],
)
def test_an_upload_is_checked(server: Served, fields: dict[str, str], data: bytes | None, status: int) -> None:
    files = {"file": ("a", data)} if data is not None else {"other": ("b", b"x")}
    answer = server.http.post("/v1/files", data=fields, files=files)
    assert answer.status_code == status, answer.text


def test_a_form_of_another_site_is_refused(server: Served) -> None:
    given: Row = {"data": {"purpose": "batch"}, "files": {"file": ("a", b"x")}}
    assert server.http.post("/v1/files", headers={"origin": "http://evil.example"}, **given).status_code == 403
    assert server.http.post("/v1/files", headers={"origin": server.url}, **given).status_code == 200
    assert server.http.post("/v1/completions", files={"file": ("a", b"x")}).status_code == 415


# -- deaths -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path / "files"


def wait(so: Callable[[], Any], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not so():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_no_line_is_lost_or_done_twice_whatever_dies(tiny: Path, folder: Path) -> None:
    """The model's process is killed, the server is killed, then told to leave: the batch ends all the same."""
    given = [line(f"q{n}", max_tokens=40, ignore_eos=True) for n in range(150)]
    more: Row = {"files_dir": str(folder), "api_keys": ["key-of-one-owner", "key-of-another"], "command": ENGINE}
    server: Served
    name, owner = "", "key-of-one-owner"

    def count() -> int:
        return int(of(server, owner).batches.retrieve(name).request_counts.completed)

    with served(tiny, **more) as server:
        name = begin(of(server, owner), given).id
        wait(lambda: count() > 20)
        server.worker.kill()
        before = count()
        wait(lambda: count() > before + 10)
        server.process.send_signal(signal.SIGKILL)
        server.process.wait()
    with served(tiny, **more) as server:
        wait(lambda: count() > before + 30)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(20) == 0
    with served(tiny, **more) as server:
        client = of(server, owner)
        batch = finish(client, client.batches.retrieve(name))
        assert batch.status == "completed" and batch.request_counts.completed == 150
        found = rows(client, batch.output_file_id)
        assert Counter(row["custom_id"] for row in found) == Counter(f"q{n}" for n in range(150))
        with pytest.raises(openai.NotFoundError):
            of(server, "key-of-another").batches.retrieve(name)
        with pytest.raises(openai.NotFoundError):
            of(server, "key-of-another").files.content(batch.output_file_id)
        assert of(server, "key-of-another").files.list().data == []


def test_files_have_bounds(tiny: Path) -> None:
    limits = {"file_bytes": 20_000, "files": 3, "files_bytes": 45_000, "batches": 2, "batch_lines": 4}
    with served(tiny, limits=limits, command=ENGINE) as server:
        client = of(server)

        def status(size: int) -> int:
            given: Row = {"data": {"purpose": "batch"}, "files": {"file": ("a", b"x" * size)}}
            return server.http.post("/v1/files", **given).status_code

        assert [status(size) for size in (20_001, 60_000, 20_000, 20_000, 10_000, 5_000, 1)] == [
            413, 413, 200, 200, 413, 200, 429
        ]  # fmt: skip
        for file in client.files.list():
            client.files.delete(file.id)
        batch = finish(client, begin(client, [line(f"q{n}") for n in range(5)]))
        assert batch.errors.data[0].code == "too_many_lines"


# -- without a server -------------------------------------------------------------------------------------------------


def test_a_file_is_answered_without_a_server_and_goes_on_where_it_stopped(
    tiny: Path, tmp_path: Path, server: Served
) -> None:
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    given = [line("a"), line("b", "/v1/completions"), line("c", "/v1/responses"), line("d", model="x")]
    source.write_bytes(jsonl(given))
    command = [sys.executable, "-m", "twofold", "run-batch", "-i", str(source), "-o", str(out), str(tiny)]
    run = subprocess.run([*command, "--num-blocks", "256"], capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 1 and "3 of 4 lines answered, 1 with an error" in run.stdout, run.stderr
    found = {row["custom_id"]: row["response"] for row in map(json.loads, out.read_text().splitlines())}
    assert found["d"]["status_code"] == 404
    alone = server.http.post("/v1/completions", json=line("b", "/v1/completions")["body"]).json()
    assert found["b"]["body"]["choices"] == alone["choices"]
    kept = out.read_bytes().splitlines(keepends=True)
    out.write_bytes(b"".join(kept[:2]) + kept[2][:20])  # as a death would leave it

    def again() -> Counts:
        config = ServeConfig(model=tiny)
        return asyncio.run(answer_file(config, EngineConfig(), source, out, command=ENGINE))

    assert again() == Counts(total=4, completed=3, failed=1)
    rows = out.read_bytes().splitlines(keepends=True)
    assert rows[:2] == kept[:2] and Counter(json.loads(row)["custom_id"] for row in rows) == Counter("abcd")
    out.write_bytes(b"".join(kept) + jsonl([{"id": "x", "custom_id": "strange"}]))
    with pytest.raises(ConfigError, match="'strange'"):
        again()
    source.write_bytes(jsonl(given) + b"nonsense")
    with pytest.raises(ConfigError, match="line 5"):
        again()
