"""A reward behind HTTP, against a small server of our own: shapes, retries, and every bad answer."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from twofold.align.rewards import Judgement, Panel, RewardConfig, endpoint
from twofold.align.rewards.endpoint import Endpoint
from twofold.align.rewards.wire import Batch, Broken


class Server(ThreadingHTTPServer):
    """Answers by the path it is asked on; remembers what was posted."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[tuple[str, dict[str, Any], str | None]] = []


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append((self.path, body, self.headers["Authorization"]))
        times = sum(path == self.path for path, _, _ in self.server.asked)
        if self.path == "/slow":
            time.sleep(3)
        if self.path == "/drip":
            self.send_response(200)
            self.end_headers()
            for _ in range(30):
                self.wfile.write(b" ")
                self.wfile.flush()
                time.sleep(0.1)
            return
        count = len(body.get("completions", body.get("query", ())))
        status = {"/500": 500, "/404": 404, "/moved": 302, "/third": 200 if times == 3 else 503}.get(self.path, 200)
        answers: dict[str, Any] = {
            "/garbage": b"<html>",
            "/huge": b"[" + b"1," * endpoint.LARGEST,
            "/short": b"[1.0]",
            "/text": b'{"rewards": ["a", "b"]}',
            "/openrlhf": json.dumps({"rewards": [0.5] * count, "extra_logs": {"seen": [1, 3]}}).encode(),
        }
        answer = answers.get(self.path, json.dumps({"rewards": [1.0] + [None] * (count - 1)}).encode())
        self.send_response(status)
        self.send_header("Location", "/elsewhere")
        self.end_headers()
        with contextlib.suppress(OSError):  # the client had read enough
            self.wfile.write(answer)

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    made = Server()
    threading.Thread(target=made.serve_forever, daemon=True).start()
    yield made
    made.shutdown()
    made.server_close()


def config(server: Server, path: str, **options: Any) -> RewardConfig:
    return RewardConfig(kind="http", url=f"http://127.0.0.1:{server.server_port}{path}", **options)


BATCH = Batch(["p", "q"], ["a", "b"], [[1], [2]], {"label": ["x", "y"]}, 7)


def test_plain_json(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REWARD_TOKEN", "secret")
    assert Endpoint(config(server, "/plain?k=1", token="REWARD_TOKEN"))(BATCH).values == [1.0, None]
    path, body, token = server.asked[-1]
    assert (path, token) == ("/plain?k=1", "Bearer secret")
    assert body == {
        "prompts": ["p", "q"],
        "completions": ["a", "b"],
        "completion_ids": [[1], [2]],
        "columns": {"label": ["x", "y"]},
        "step": 7,
    }


def test_openrlhf_protocol(server: Server) -> None:
    scored = Endpoint(config(server, "/openrlhf", protocol="openrlhf"))(BATCH)
    assert scored.values == [0.5, 0.5] and scored.metrics == {"seen": 2.0}
    assert server.asked[-1][1] == {"query": ["pa", "qb"], "prompts": ["p", "q"], "labels": ["x", "y"]}


def test_it_tries_again_and_then_gives_up(server: Server) -> None:
    assert Endpoint(config(server, "/third"))(BATCH).values == [1.0, None]
    with pytest.raises(Broken, match="status 500, attempt 2 of 2"):
        Endpoint(config(server, "/500", retries=1))(BATCH)
    assert sum(path == "/500" for path, _, _ in server.asked) == 2


@pytest.mark.parametrize(
    ("path", "said", "reason"),
    [
        ("/404", "status 404", "http"),
        ("/moved", "status 302", "http"),
        ("/garbage", "not JSON", "http"),
        ("/huge", "more than", "too large"),
    ],
)
def test_an_answer_that_will_not_get_better_is_asked_for_once(
    server: Server, path: str, said: str, reason: str
) -> None:
    with pytest.raises(Broken, match=said) as error:
        Endpoint(config(server, path))(BATCH)
    assert error.value.reason == reason
    assert sum(asked == path for asked, _, _ in server.asked) == 1
    assert not any(asked == "/elsewhere" for asked, _, _ in server.asked)


@pytest.mark.parametrize("path", ["/slow", "/drip"])
def test_silence_and_dripping_end_in_time(server: Server, path: str) -> None:
    start = time.monotonic()
    with pytest.raises(Broken, match="no answer in time"):
        Endpoint(config(server, path, timeout=0.5, retries=5))(BATCH)
    assert time.monotonic() - start < 2


def test_nobody_listens(server: Server) -> None:
    unused = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    unused.server_close()
    with pytest.raises(Broken, match="ConnectionRefusedError"):
        Endpoint(RewardConfig(kind="http", url=f"http://127.0.0.1:{unused.server_port}/", retries=1))(BATCH)


def test_in_a_panel_each_fault_is_counted(server: Server) -> None:
    configs = [config(server, f"/{name}", name=name, retries=0) for name in ("plain", "500", "short", "text")]
    with Panel(configs) as panel:
        said: Judgement = panel.score(["p", "q"], ["a", "b"], [[1], [2]])
    assert said.parts == {"plain": [1.0, None], "500": [None] * 2, "short": [None] * 2, "text": [None] * 2}
    assert {name: dict(reasons) for name, reasons in said.faults.items()} == {
        "plain": {},
        "500": {"http": 2},
        "short": {"count": 2},
        "text": {"type": 2},
    }
    assert said.totals == [1.0, None]
