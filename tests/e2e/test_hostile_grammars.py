"""Whatever form is asked for, the answer is one or a 4xx, and who else is served does not notice."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hostile_grammars import hostile
from served import Served, served

MOST = 150
LONG = {
    "prompt": "go on",
    "max_tokens": MOST,
    "stream": True,
    "ignore_eos": True,
    "stream_options": {"include_usage": True},
}


class Neighbour:
    """A client that streams one answer after the other until told to stop."""

    def __init__(self, server: Served) -> None:
        self.server, self.told, self.wrong = server, 0, ""
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.is_set() and not self.wrong:
            events = []
            with self.server.http.stream("POST", "/v1/completions", json=LONG, timeout=120) as answer:
                for line in answer.iter_lines():
                    if line.startswith("data: {"):
                        events.append(json.loads(line.removeprefix("data: ")))
            if not events or "error" in events[-1] or events[-1]["usage"]["completion_tokens"] != MOST:
                self.wrong = str(events[-1:])
            self.told += 1

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()


def ask(server: Served, fields: dict[str, Any]) -> tuple[int, str]:
    body = {"prompt": "x", "max_tokens": 6, **fields}
    answer = server.http.post("/v1/completions", json=body, timeout=120)
    return answer.status_code, answer.text[:300]


def test_hostile_grammars_hurt_nobody(tiny: Path) -> None:
    forms = hostile()
    assert len(forms) >= 60
    with served(tiny) as server:
        neighbour = Neighbour(server)
        try:
            with ThreadPoolExecutor(4) as pool:
                answers = dict(zip(forms, pool.map(lambda fields: ask(server, fields), forms.values())))
        finally:
            neighbour.stop()
        statuses = {name: status for name, (status, _) in answers.items()}
        assert {name: answers[name] for name, status in statuses.items() if status not in (200, 400, 413)} == {}
        for name, (status, text) in answers.items():
            if status == 400:
                error = json.loads(text if text.endswith("}") else "{}").get("error", {})
                assert not error or error["param"], (name, text)
        assert sum(status == 200 for status in statuses.values()) >= 15
        assert sum(status == 400 for status in statuses.values()) >= 40
        assert neighbour.told > 0 and not neighbour.wrong
        assert server.stats()["engine_restarts_total"] == 0, "the model's process never died"
        assert ask(server, {"structured_outputs": {"choice": ["yes"]}})[0] == 200
        server.wait(server.idle)


@pytest.mark.parametrize(
    "body",
    [
        b'{"prompt": "x", "structured_outputs": {"regex": "\xff\xfe"}}',
        b'{"prompt": "x", "structured_outputs": {"regex": "\\ud800"}}',
        b'{"prompt": "x", "structured_outputs": {"json": ' + b"[" * 50_000 + b"]" * 50_000 + b"}}",
        b'{"prompt": "x", "structured_outputs": {"json": {"minimum": 1e999}}}',
        b'{"prompt": "x", "structured_outputs": {"json": {"const": ' + b"9" * 6000 + b"}}}",
        b'{"prompt": "x", "response_format": {"type": "json_schema", "json_schema": {"schema": "\\u0000"}}}',
    ],
)
def test_bodies_that_are_no_form(server: Served, body: bytes) -> None:
    answer = server.http.post("/v1/completions", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400 and answer.json()["error"]["message"]
