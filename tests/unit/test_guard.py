"""The guard and the routes behind it, asked in process: every route needs a key, and no model is needed to say no."""

from __future__ import annotations

import asyncio
import base64
import functools
import json
import logging
import re
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from starlette.routing import Route
from toy_tokenizers import byte_level, save

from twofold.serve import wire
from twofold.serve.app import Api, build_app
from twofold.serve.client import EngineClient
from twofold.serve.config import Limits, ServeConfig
from twofold.serve.guard import OPEN, Keys
from twofold.serve.texts import Texts

KEY = "correct-horse-battery"
OTHER = "another-good-key-9"


@functools.cache
def texts() -> Texts:
    with tempfile.TemporaryDirectory() as folder:
        return Texts(save(byte_level(), Path(folder)), None)


class Answer:
    def __init__(self) -> None:
        self.status = 0
        self.headers: dict[str, str] = {}
        self.body = b""

    @property
    def error(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.body)["error"]
        assert set(found) in ({"message", "type", "param", "code"}, {"message", "type"})
        return found


def ask(
    method: str = "GET",
    path: str = "/health",
    *,
    headers: Iterable[tuple[str, str]] = (),
    host: str | None = "localhost",
    body: bytes | list[bytes] = b"",
    keys: tuple[str, ...] = (),
    draining: bool = False,
    slow: bool = False,
    **config: Any,
) -> Answer:
    """One request through the whole application, without a socket and without a model."""

    async def run() -> Answer:
        settings = ServeConfig(model=Path("tiny"), api_keys=keys, **config)
        api = Api(settings, EngineClient(settings, wire.Start("")), texts())
        api.shared.draining = draining
        given = [(b"host", host.encode("latin-1"))] if host is not None else []
        given += [(name.lower().encode(), value.encode("latin-1")) for name, value in headers]
        chunks = [body] if isinstance(body, bytes) else list(body)
        scope = {
            "type": "http", "method": method, "path": path, "raw_path": path.encode(), "query_string": b"",
            "headers": given, "client": ("127.0.0.1", 5), "server": ("127.0.0.1", 8000), "scheme": "http",
            "http_version": "1.1", "asgi": {"version": "3.0"}, "root_path": "",
        }  # fmt: skip
        answer = Answer()

        async def receive() -> dict[str, Any]:
            if slow or not chunks:
                await asyncio.sleep(30 if slow else 0)
                return {"type": "http.disconnect"}
            return {"type": "http.request", "body": chunks.pop(0), "more_body": bool(chunks)}

        async def send(message: Any) -> None:
            if message["type"] == "http.response.start":
                assert not answer.status
                answer.status = message["status"]
                answer.headers = {name.decode(): value.decode() for name, value in message["headers"]}
            else:
                answer.body += message.get("body", b"")

        await build_app(api)(scope, receive, send)
        return answer

    return asyncio.run(run())


def post(path: str, body: Any, **given: Any) -> Answer:
    data = body if isinstance(body, bytes | list) else json.dumps(body).encode()
    size = sum(map(len, data)) if isinstance(data, list) else len(data)
    headers = [("content-type", "application/json"), ("content-length", str(size)), *given.pop("headers", ())]
    return ask("POST", path, body=data, headers=headers, **given)


def bearer(key: str) -> list[tuple[str, str]]:
    return [("authorization", f"Bearer {key}")]


def every_route() -> list[tuple[str, str]]:
    async def run() -> list[tuple[str, str]]:
        settings = ServeConfig(model=Path("tiny"))
        routes = Api(settings, EngineClient(settings, wire.Start("")), texts()).routes()
        found = []
        for route in routes:
            assert isinstance(route, Route), "a route of another kind needs a place in this test"
            path = re.sub(r"{\w+(:path)?}", "index.html", route.path)
            found += [(method, path) for method in sorted(route.methods or ())]
        return found

    return asyncio.run(run())


WRONG_KEYS: list[list[tuple[str, str]]] = [
    [],
    bearer("wrong"),
    bearer(KEY[:-1]),
    bearer(KEY + "x"),
    bearer("x" * 10_000),
    bearer(""),
    [*bearer(KEY), *bearer(KEY)],
    [("authorization", KEY)],
    [("authorization", f"Token {KEY}")],
    [("authorization", f"Basic {KEY}")],
    [("authorization", "Basic " + base64.b64encode(KEY.encode()).decode())],
    [("x-api-key", "wrong")],
    [("x-api-key", f"Bearer {KEY}")],
    [("x-api-key", KEY), ("x-api-key", KEY)],
    [*bearer("wrong"), ("x-api-key", KEY)],
]


@pytest.mark.parametrize(("method", "path"), every_route())
def test_every_route_needs_a_key_but_the_liveness_ones(method: str, path: str) -> None:
    for headers in WRONG_KEYS:
        answer = ask(method, path, headers=headers, keys=(KEY, OTHER))
        if path in OPEN:
            assert answer.status in (200, 503)
        else:
            assert answer.status == 401, (headers, answer.body)
            assert method == "HEAD" or answer.error["type"] == "authentication_error"
    for headers in (bearer(KEY), bearer(OTHER), [("x-api-key", OTHER)]):
        assert ask(method, path, headers=headers, keys=(KEY, OTHER)).status != 401


def test_a_route_that_does_not_exist_needs_a_key_too() -> None:
    assert ask(path="/nothing", keys=(KEY,)).status == 401
    assert ask(path="//livez", keys=(KEY,)).status == 401
    assert ask(path="/livez/../v1/models", keys=(KEY,)).status == 401
    answer = ask(path="/nothing", keys=(KEY,), headers=bearer(KEY))
    assert answer.status == 404 and answer.error["type"] == "not_found_error"
    assert ask("POST", "/v1/models", keys=(KEY,), headers=bearer(KEY)).status == 415
    assert ask("DELETE", "/v1/models", keys=(KEY,), headers=bearer(KEY)).status == 405
    assert ask("OPTIONS", "/v1/models").status == 405


def test_a_browser_is_asked_for_the_key_as_a_password() -> None:
    answer = ask(path="/", keys=(KEY,), headers=[("accept", "text/html,*/*")])
    assert answer.status == 401 and answer.headers["www-authenticate"].startswith("Basic")
    given = "Basic " + base64.b64encode(f"anyone:{KEY}".encode()).decode()
    page = ask(path="/", keys=(KEY,), headers=[("authorization", given)])
    assert page.status == 200 and page.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in page.headers["content-security-policy"]


def test_keys_are_told_apart_and_not_kept() -> None:
    keys = Keys((KEY, OTHER))
    owners = {keys.find(KEY.encode()), keys.find(OTHER.encode())}
    assert len(owners) == 2 and None not in owners
    assert keys.find(b"") is None
    assert not any(KEY in repr(value) for value in vars(keys).values())


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 503), ("localhost:8000", 503), ("127.0.0.1:1", 503), ("[::1]:80", 503), ("LOCALHOST", 503),
        ("evil.example", 403), ("127.0.0.1.evil.example", 403), ("localhost.", 403),
        (None, 400), ("", 400), ("a/p?x=", 400), ("localhost:8000/livez", 400), ("localhost:x", 400),
        ("localhost@evil", 400), ("local host", 400), ("localhost:123456", 400), ("[::1", 400), ("é", 400),
        ("localhost#", 400), ("localhost\\x", 400),
    ],
)  # fmt: skip
def test_hosts_on_loopback(host: str | None, status: int) -> None:
    assert ask(host=host).status == status  # 503: let in, and there is no model


def test_two_hosts_are_none() -> None:
    assert ask(headers=[("host", "localhost")]).status == 400


def test_other_hosts_when_the_operator_says_so() -> None:
    assert ask(host="api.example", allowed_hosts=("api.example",)).status == 503
    assert ask(host="localhost", allowed_hosts=("api.example",)).status == 403
    assert ask(host="any.example", allowed_hosts=("*",)).status == 503


def test_bodies_that_are_too_large() -> None:
    small = Limits(body_bytes=1000)
    answer = post("/v1/completions", b"x" * 1001, limits=small)
    assert answer.status == 413 and answer.headers["connection"] == "close"
    chunked = [("content-type", "application/json"), ("transfer-encoding", "chunked")]
    assert ask("POST", "/v1/completions", body=[b"x" * 600] * 3, headers=chunked, limits=small).status == 413
    assert post("/v1/completions", b"x" * 1000, limits=small).status == 400


def test_a_body_that_never_ends() -> None:
    answer = post("/v1/completions", b"", slow=True, limits=Limits(body_seconds=0.1))
    assert answer.status == 408 and answer.error["code"] == "body_timeout"


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", None])
def test_only_json_is_read(kind: str | None) -> None:
    headers = [("content-type", kind)] if kind else []
    answer = ask("POST", "/v1/completions", body=b'{"prompt":"x"}', headers=headers)
    assert answer.status == 415 and "application/json" in answer.error["message"]


def test_a_lame_duck_takes_nothing_new_and_says_so() -> None:
    answer = post("/v1/completions", {"prompt": "x"}, draining=True)
    assert answer.status == 503 and answer.headers["retry-after"] and answer.headers["connection"] == "close"
    assert ask(path="/readyz", draining=True).status == 503
    assert ask(path="/livez", draining=True).status == 200


def test_no_answer_invites_another_origin() -> None:
    for headers in ([("origin", "http://evil.example")], [("access-control-request-method", "POST")]):
        for method, path in (("GET", "/v1/models"), ("OPTIONS", "/v1/completions"), ("GET", "/")):
            found = ask(method, path, headers=headers).headers
            assert not [name for name in found if name.startswith("access-control")]
            assert found["x-content-type-options"] == "nosniff"


def test_request_ids_are_given_kept_and_never_forged() -> None:
    assert len(ask().headers["x-request-id"]) == 16
    assert ask(headers=[("x-request-id", "mine-1")]).headers["x-request-id"] == "mine-1"
    for bad in ("a b", "a\nb", "x" * 65, "é"):
        assert ask(headers=[("x-request-id", bad)]).headers["x-request-id"] != bad


def test_before_the_model_is_there_requests_are_told_to_wait() -> None:
    answer = post("/v1/completions", {"prompt": "x"})
    assert answer.status == 503 and int(answer.headers["retry-after"]) >= 1
    assert ask(path="/readyz").status == 503 and ask(path="/livez").status == 200


def test_logs_hold_neither_prompts_nor_keys(caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("twofold").propagate = True
    with caplog.at_level(logging.DEBUG):
        post("/v1/completions", {"prompt": "canary-prompt", "stop": 5}, keys=(KEY,), headers=bearer(KEY))
        post("/v1/completions", {"prompt": "canary-prompt"}, keys=(KEY,), headers=bearer("canary-key"))
    assert any("/v1/completions" in record.getMessage() for record in caplog.records)
    assert all(hasattr(record, "request_id") for record in caplog.records if record.name == "twofold.access")
    assert "canary" not in caplog.text and KEY not in caplog.text


def test_no_file_outside_the_page_can_be_named() -> None:
    for path in ("/ui/../config.py", "/ui/%2e%2e/config.py", "/ui//etc/passwd", "/ui/", "/ui/../../pyproject.toml"):
        assert ask(path=path).status == 404
    assert ask(path="/ui/app.js").headers["content-type"].startswith("text/javascript")
    etag = ask(path="/ui/app.js").headers["etag"]
    assert ask(path="/ui/app.js", headers=[("if-none-match", etag)]).status == 304
