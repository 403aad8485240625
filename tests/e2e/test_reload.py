"""Keys and limits changed while the server runs: by a route, by a signal, for new requests, never by a bad file."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest
from served import ROOT, Served, served

ENGINE = [sys.executable, str(ROOT / "tests" / "unit" / "fake_engine.py")]
FIRST, SECOND = "key-of-the-first", "key-of-the-second"


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def status(server: Served, key: str, size: int = 10) -> int:
    body = {"prompt": "x", "max_tokens": 1, "user": "x" * size}
    return server.http.post("/v1/completions", json=body, headers=bearer(key)).status_code


def reload(server: Served, key: str = FIRST) -> httpx.Response:
    return server.http.post("/reload", json={}, headers=bearer(key))


def test_keys_and_limits_change_and_streams_go_on(tiny: Path, tmp_path: Path) -> None:
    keys, config = tmp_path / "keys", tmp_path / "serve.toml"
    keys.write_text(f"# who may\n{FIRST}\n\n")
    config.write_text("request_seconds = 50\n[limits]\nbody_bytes = 5000\n")
    given: dict[str, Any] = {"config": str(config), "api_keys_file": str(keys), "command": ENGINE}
    with served(tiny, **given) as server:
        assert (status(server, FIRST), status(server, SECOND), status(server, FIRST, 6000)) == (200, 401, 413)
        body = {"prompt": "x", "max_tokens": 300, "stream": True, "ignore_eos": True}
        with server.http.stream("POST", "/v1/completions", json=body, headers=bearer(FIRST)) as answer:
            lines = answer.iter_lines()
            next(lines)
            keys.write_text(f"{SECOND}\n")
            config.write_text("[limits]\nbody-bytes = 20_000\n")
            found = reload(server)
            assert found.status_code == 200, found.text
            assert found.json() == {
                "changed": ["api_keys", "limits.body_bytes", "request_seconds"], "keys": 1, "object": "reload"
            }  # fmt: skip
            assert FIRST not in found.text and SECOND not in found.text
            assert (status(server, FIRST), status(server, SECOND), status(server, SECOND, 6000)) == (401, 200, 200)
            assert reload(server).status_code == 401
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]" and len(rest) > 3
        keys.write_text(f"{FIRST}\n{SECOND}\n")
        server.process.send_signal(signal.SIGHUP)
        server.wait(lambda: status(server, FIRST) == 200)
        assert reload(server).json()["changed"] == []
        assert any("reloaded: api_keys" in line for line in server.log)
        assert not any(FIRST in line or SECOND in line for line in server.log)
        _bad_files(server, keys, config)


def _bad_files(server: Served, keys: Path, config: Path) -> None:
    for text, word in (
        ("[limits", "TOML"),
        ("[limits]\nbody_byte = 3\n", "body_bytes"),
        ("[limits]\nbody_bytes = 0\n", "body_bytes"),
        ("[limits]\nbody_bytes = 'x'\n", "body_bytes"),
        ("port = 80\n", "port"),
        ("limits = 3\n", "limits"),
        ("request_seconds = -1\n", "request_seconds"),
    ):
        config.write_text(text)
        answer = reload(server)
        assert answer.status_code == 400 and word in answer.json()["error"]["message"], (text, answer.text)
    assert (status(server, FIRST, 6000), status(server, SECOND)) == (200, 200)
    config.unlink()
    assert reload(server).status_code == 400
    config.write_text("")
    for text in ("", "# nobody\n", "short\n", "two words here\n"):
        keys.write_text(text)
        server.process.send_signal(signal.SIGHUP)
        answer = reload(server)
        assert answer.status_code == 400, text
    assert (status(server, FIRST), status(server, SECOND)) == (200, 200)
    assert sum("the old settings hold" in line for line in server.log) >= 12


def test_without_keys_nobody_reloads_by_the_route(server: Served) -> None:
    assert server.http.post("/reload", json={}).status_code == 403


@pytest.mark.parametrize("text", ["nonsense", "[limits]\nx = 1\n", "host = '0.0.0.0'\n"])
def test_a_bad_file_at_the_start_is_told_at_once(tiny: Path, tmp_path: Path, text: str) -> None:
    config = tmp_path / "serve.toml"
    config.write_text(text)
    with pytest.raises(AssertionError, match="ConfigError"), served(tiny, config=str(config), command=ENGINE):
        pass
