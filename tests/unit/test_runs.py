"""Runs as the server reads them: which there are, their rows from one on, and nothing from anywhere else."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient
from toy_tokenizers import byte_level, save

from twofold.serve import wire
from twofold.serve.app import Api, build_app
from twofold.serve.client import EngineClient
from twofold.serve.config import ServeConfig
from twofold.serve.errors import HttpError
from twofold.serve.guard import App, Receive, Scope, Send
from twofold.serve.runs import Runs
from twofold.serve.texts import Texts
from twofold.train.journal import Journal

NOW = time.time()


@pytest.fixture(autouse=True)
def _now(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "NOW", time.time())


def rows(count: int, *, at: float | None = None, first: int = 1) -> list[dict[str, Any]]:
    """Steps a second apart, the last one at the time `at`; left out, when the test began."""
    steps, at = range(first, first + count), NOW if at is None else at
    return [{"step": s, "loss": 9.0 / s, "tokens": 8 * s, "time": at - (steps[-1] - s)} for s in steps]


def text(some: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in some)


def write(folder: Path, some: list[dict[str, Any]], *, steps: int | None = None) -> Path:
    """A run directory with a log and, where `steps` says how many there are to be, a checkpoint of the last row."""
    folder.mkdir(parents=True)
    (folder / "log.jsonl").write_text(text(some), encoding="utf-8")
    if steps is not None:
        checkpoint = folder / "checkpoints" / f"step-{some[-1]['step']:08d}"
        checkpoint.mkdir(parents=True)
        (checkpoint / "trainer.json").write_text(json.dumps({"recipe": {"schedule.steps": steps}}), encoding="utf-8")
    return folder


@contextmanager
def asking(runs: Path, tmp_path: Path, **config: Any) -> Iterator[TestClient]:
    settings = ServeConfig(model=Path("tiny"), runs=runs, **config)
    (tmp_path / "words").mkdir()
    texts, made = Texts(save(byte_level(), tmp_path / "words"), None), list[App]()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if not made:  # the engine's client wants the loop that it will live in
            made.append(build_app(Api(settings, EngineClient(settings, wire.Start("")), texts)))
        await made[0](scope, receive, send)

    with TestClient(app, base_url="http://localhost", raise_server_exceptions=False) as client:
        yield client


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "runs"


@pytest.fixture
def client(root: Path, tmp_path: Path) -> Iterator[TestClient]:
    with asking(root, tmp_path) as client:
        yield client


def test_runs_are_listed_with_their_state(client: TestClient, root: Path) -> None:
    write(root / "going", rows(5), steps=100)
    write(root / "pybot" / "chat", rows(5, at=NOW - 500), steps=100)
    write(root / "done", rows(5, at=NOW - 1000), steps=5)
    found = {run["name"]: run for run in client.get("/runs").json()["runs"]}
    assert list(found) == ["going", "pybot/chat", "done"]  # the one that wrote last first
    assert [run["state"] for run in found.values()] == ["running", "stopped", "finished"]
    going = found["going"]
    assert (going["step"], going["steps"], going["rows"], going["tokens"]) == (5, 100, 5, 40)
    assert going["loss"] == 9.0 / 5
    assert [c["step"] for c in going["checkpoints"]] == [5]
    assert 490 < found["pybot/chat"]["seconds"] < 600


def test_a_slow_run_is_not_taken_for_a_stopped_one(root: Path) -> None:
    slow = [{"step": s, "loss": 1.0, "time": NOW - 200 - 30 * (5 - s)} for s in range(1, 6)]
    write(root / "slow", slow)
    assert [run["state"] for run in Runs(root).listing()] == ["running"]


def test_a_run_that_left_its_model_is_finished_without_a_checkpoint(root: Path) -> None:
    (write(root / "a", rows(3, at=NOW - 500)) / "model").mkdir()
    assert [run["state"] for run in Runs(root).listing()] == ["finished"]


def test_rows_come_from_the_one_asked_for_on(client: TestClient, root: Path) -> None:
    write(root / "a", rows(3))
    whole = client.get("/runs/a").json()
    assert (whole["from"], whole["rows"], whole["more"]) == (0, rows(3), False)
    with (root / "a" / "log.jsonl").open("a", encoding="utf-8") as log:
        log.write(text(rows(1, first=4)))
        log.write('{"step": 5, "lo')
    new = client.get("/runs/a", params={"from": 3, "version": whole["version"]}).json()
    assert (new["from"], new["rows"]) == (3, rows(1, first=4)), "the torn line is left out"
    with (root / "a" / "log.jsonl").open("a", encoding="utf-8") as log:
        log.write('ss": 1.5}\n')
    last = client.get("/runs/a", params={"from": 4, "version": whole["version"]}).json()
    assert last["rows"] == [{"step": 5, "loss": 1.5}]
    assert client.get("/runs/a", params={"from": 5, "version": whole["version"]}).json()["rows"] == []


def test_rollouts_are_told_by_their_number_until_one_row_is_asked_for(client: TestClient, root: Path) -> None:
    answers = [{"prompt": "2 + 2 =", "text": "4" * 1000, "reward": 1.0}] * 3
    told = [{"step": step, "rollouts": answers, "time": NOW} for step in (1, 2)]
    write(root / "played", [told[0], {"step": 1, "loss": 1.0, "time": NOW}, told[1]])
    all_of_it = client.get("/runs/played").json()
    assert [row.get("rollouts") for row in all_of_it["rows"]] == [3, None, 3]
    assert not all_of_it["more"]
    asked = {"row": 2, "version": all_of_it["version"]}
    assert client.get("/runs/played", params=asked).json() == {"version": all_of_it["version"], "row": told[1]}
    assert client.get("/runs/played", params=asked | {"row": 1}).json()["row"]["loss"] == 1.0
    for changed in ({"row": 3}, {"version": "another"}, {"row": 10**15 - 1}):
        gone = client.get("/runs/played", params=asked | changed)
        assert (gone.status_code, gone.json()["error"]["code"]) == (404, "row_not_found"), changed
    assert client.get("/runs/played", params=asked | {"row": -1}).status_code == 400


def test_a_row_of_rollouts_that_is_too_large_is_counted_and_not_sent(
    client: TestClient, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("twofold.serve.runs.MOST_ROW_BYTES", 100)
    write(root / "vast", [{"step": 1, "rollouts": [{"text": "a" * 100}], "time": NOW}])
    found = client.get("/runs/vast").json()
    assert [row["rollouts"] for row in found["rows"]] == [1]
    assert client.get("/runs/vast", params={"row": 0, "version": found["version"]}).status_code == 404


def test_a_log_cut_back_is_told_from_its_beginning(client: TestClient, root: Path) -> None:
    log = write(root / "a", rows(6)) / "log.jsonl"
    before = client.get("/runs/a").json()
    fresh = rows(2, at=NOW - 4) + rows(7, first=3, at=NOW + 9)
    log.with_suffix(".tmp").write_text(text(fresh), encoding="utf-8")
    os.replace(log.with_suffix(".tmp"), log)
    after = client.get("/runs/a", params={"from": 6, "version": before["version"]}).json()
    assert after["version"] != before["version"]
    assert (after["from"], after["rows"]) == (0, fresh)


def test_a_journal_is_read_as_it_was_written(root: Path) -> None:
    runs, journal = Runs(root), Journal(root / "a")
    journal.add(1, loss=2.5, lr=0.1)
    journal.add(1, prompt="def", text="né")
    before = runs.rows("a")
    assert before["rows"] == journal.rows
    journal.add(2, skipped="the gradient is not finite")
    journal.close()
    again = Journal(root / "a", keep_to=1)  # the run was killed and goes on from its checkpoint
    again.add(2, loss=2.25)
    after = runs.rows("a", before["from"] + len(before["rows"]), before["version"])
    assert before["rows"] + after["rows"] == again.rows
    again.close()


def test_many_rows_come_in_parts(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(root / "a", rows(10))
    monkeypatch.setattr("twofold.serve.runs.Log.rows.__defaults__", (4,))
    runs, more = Runs(root), True
    found: list[dict[str, Any]] = []
    while more:
        part = runs.rows("a", len(found))
        assert len(part["rows"]) <= 4
        found, more = found + part["rows"], part["more"]
    assert found == rows(10)


def test_a_number_that_is_none_is_null(client: TestClient, root: Path) -> None:
    folder = write(root / "a", rows(1))
    (folder / "log.jsonl").write_text('{"step": 1, "valid_loss": NaN}\n', encoding="utf-8")
    assert client.get("/runs/a").json()["rows"] == [{"step": 1, "valid_loss": None}]


@pytest.mark.parametrize(
    "name", ["../secret", "..%2Fsecret", "%2e%2e/secret", "a/../../secret", "/secret", "linked", "piped", "a/log.jsonl"]
)
def test_nothing_outside_the_directory_can_be_named(client: TestClient, root: Path, name: str) -> None:
    write(root / "a", rows(1))
    write(root.parent / "secret", rows(1))
    (root / "linked").symlink_to(root.parent / "secret")
    (root / "piped").mkdir()
    (root / "piped" / "log.jsonl").symlink_to(root.parent / "secret" / "log.jsonl")
    assert client.get(f"/runs/{name}").status_code == 404
    with pytest.raises(HttpError, match="no run"):
        Runs(root).rows(name)
    assert [run["name"] for run in client.get("/runs").json()["runs"]] == ["a"]


def test_a_run_swapped_for_a_pipe_is_gone_and_nobody_waits(client: TestClient, root: Path) -> None:
    log = write(root / "a", rows(1)) / "log.jsonl"
    runs = Runs(root)
    assert runs.listing()
    log.unlink()
    os.mkfifo(log)
    assert client.get("/runs/a").status_code == 404
    assert runs.listing() == []


def test_one_run_can_be_the_directory(root: Path) -> None:
    write(root, rows(2))
    runs = Runs(root)
    assert [run["name"] for run in runs.listing()] == ["runs"]
    assert runs.rows("runs")["rows"] == rows(2)


def test_without_runs_the_list_is_empty(client: TestClient, root: Path) -> None:
    assert client.get("/runs").json() == {"directory": str(root), "runs": []}
    assert client.get("/runs/a").json()["error"]["code"] == "run_not_found"
    write(root / "late", rows(1))
    assert len(client.get("/runs").json()["runs"]) == 1


@pytest.mark.parametrize("given", ["-1", "x", "1.5", "", "9" * 30])
def test_a_row_number_is_a_number(client: TestClient, root: Path, given: str) -> None:
    write(root / "a", rows(1))
    answer = client.get("/runs/a", params={"from": given})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "from")


def test_keys_and_hosts_are_asked_for_and_nothing_is_written(root: Path, tmp_path: Path) -> None:
    write(root / "a", rows(1))
    with asking(root, tmp_path, api_keys=("open-sesame",)) as client:
        for path in ("/runs", "/runs/a", "/train"):
            assert client.get(path).status_code == 401
            assert client.get(path, headers={"host": "elsewhere.example"}).status_code == 403
            key = {"authorization": "Bearer open-sesame", "content-type": "application/json"}
            assert client.get(path, headers=key).status_code == 200
            assert client.post(path, headers=key, content="{}").status_code == 405


def test_evaluations_of_a_run_and_of_its_model_are_listed_by_task(root: Path) -> None:
    folder, runs = write(root / "small", rows(3)), Runs(root)
    assert runs.listing()[0]["evaluations"] == []
    (folder / "evaluation.json").write_text('{"evaluations": [{"task": "b", "prompts": 1}, {"task": "a"}, 7]}')
    (folder / "model").mkdir()
    (folder / "model" / "evaluation.json").write_text('{"evaluations": [{"task": "b", "prompts": 2}]}')
    assert runs.listing()[0]["evaluations"] == [{"task": "a"}, {"task": "b", "prompts": 2}]
    (folder / "evaluation.json").unlink()
    assert runs.listing()[0]["evaluations"] == [{"task": "b", "prompts": 2}]


@pytest.mark.parametrize("text", ["", "[]", '{"evaluations": 3}', '{"evaluations": [{"task": 3}]}', "{" * 5000])
def test_what_is_no_record_of_evaluations_is_none(root: Path, text: str) -> None:
    folder = write(root / "small", rows(3))
    (folder / "evaluation.json").write_text(text)
    assert Runs(root).listing()[0]["evaluations"] == []
