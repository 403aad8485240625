"""A server that is not ours, asked by `twofold evaluate`: it is full at times, and knows none of our extra fields."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest

from twofold import cli

KNOWN = {"model", "prompt", "n", "seed", "temperature", "top_p", "max_tokens", "stop"}
TASK = 'prompts = "asked.jsonl"\nk = [1]\nsamples = 3\n[[rewards]]\nkind = "regex"\npattern = "yes"\n'


class Strict(BaseHTTPRequestHandler):
    """Says yes, greedily, and else no; counts what it was asked."""

    bodies: ClassVar[list[dict[str, Any]]] = []
    full: ClassVar[int] = 0
    broken: ClassVar[bool] = False
    keys: ClassVar[set[str | None]] = set()

    def do_GET(self) -> None:
        self.answer(200, {"data": [{"id": "theirs"}]})

    def do_POST(self) -> None:
        Strict.keys.add(self.headers.get("Authorization"))
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if set(body) - KNOWN:
            self.answer(400, {"error": {"message": "unknown field top_k"}})
        elif Strict.full:
            Strict.full -= 1
            self.answer(429, {"error": {"message": "full"}})
        elif Strict.broken:
            self.answer(200, {"nonsense": 1})
        else:
            Strict.bodies.append(body)
            text = "no" if body["temperature"] else "yes"
            choices = [{"index": i, "text": text, "finish_reason": "stop"} for i in reversed(range(body["n"]))]
            self.answer(200, {"choices": choices})

    def answer(self, status: int, body: dict[str, Any]) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def url() -> Iterator[str]:
    Strict.bodies, Strict.full, Strict.broken, Strict.keys = [], 0, False, set()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Strict)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}/v1"
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def task(tmp_path: Path) -> str:
    (tmp_path / "asked.jsonl").write_text("".join(json.dumps({"prompt": f"Is it {n}?"}) + "\n" for n in range(12)))
    (tmp_path / "task.toml").write_text(TASK)
    return str(tmp_path / "task.toml")


def test_a_server_of_another_make(url: str, task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr("twofold.commands.evaluate.sleep", waits.append)
    Strict.full = 2
    out = tmp_path / "out.json"
    assert cli.main(["evaluate", url, task, "--api-key", "secret", "--output", str(out)]) == 0
    (found,) = json.loads(out.read_text())["evaluations"]
    assert (found["model"], found["greedy"]["passed"], found["pass@k"]["1"]["value"]) == ("theirs", 12, 0.0)
    assert found["length"] is None, "it does not tell what its tokens were"
    assert len(Strict.bodies) == 24
    assert len({body["seed"] for body in Strict.bodies}) == 12, "a seed for each prompt"
    assert len(waits) == 2
    assert Strict.keys == {"Bearer secret"}


@pytest.mark.parametrize(("attribute", "value", "told"), [("broken", True, "KeyError"), ("full", 999, "429: full")])
def test_a_server_that_gives_nothing(
    attribute: str,
    value: int,
    told: str,
    url: str,
    task: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("twofold.commands.evaluate.sleep", lambda seconds: None)
    setattr(Strict, attribute, value)
    assert cli.main(["evaluate", url, task]) == 2
    assert told in capsys.readouterr().err
