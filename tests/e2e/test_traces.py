"""Traces as a collector gets them: a local HTTP receiver that reads OTLP's own protocol buffers."""

from __future__ import annotations

import gzip
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status
from served import ROOT, served

from twofold.core import ConfigError
from twofold.serve.tracing import Tracing, endpoint_of

ENGINE = [sys.executable, str(ROOT / "tests" / "unit" / "fake_engine.py")]
TRACE, ABOVE = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


class Receiver:
    """A collector: `spans` is what came to /v1/traces, `headers` with what."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self.services: set[str] = set()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                if self.headers.get("content-encoding") == "gzip":
                    body = gzip.decompress(body)
                message = ExportTraceServiceRequest.FromString(body)
                for group in message.resource_spans:
                    outer.services |= {
                        a.value.string_value for a in group.resource.attributes if a.key == "service.name"
                    }
                    outer.spans += [span for scope in group.scope_spans for span in scope.spans]
                self.send_response(200 if self.path == "/v1/traces" else 404)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, format: str, *args: Any) -> None:
                """Say nothing."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"

    def of(self, request: str) -> dict[str, Span]:
        """The spans of one request, by name."""
        (top,) = [span for span in self.spans if attributes(span).get("gen_ai.request.id") == request]
        return {span.name: span for span in self.spans if span.trace_id == top.trace_id}

    def wait(self, count: int) -> None:
        until = time.monotonic() + 15
        while len(self.spans) < count:
            assert time.monotonic() < until, f"{len(self.spans)} of {count} spans came"
            time.sleep(0.02)


def attributes(span: Span) -> dict[str, Any]:
    found = {}
    for one in span.attributes:
        kind = one.value.WhichOneof("value")
        found[one.key] = getattr(one.value, kind)
    return found


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    made = Receiver()
    yield made
    made.server.shutdown()
    made.server.server_close()


def test_a_request_is_a_span_below_the_callers(tiny: Path, receiver: Receiver) -> None:
    with served(tiny, command=ENGINE, otlp_traces_endpoint=f"{receiver.url}/v1/traces") as server:
        body = {"prompt": "xylophone", "max_tokens": 6, "temperature": 0.5, "n": 2}
        headers = {"x-request-id": "traced-1", "traceparent": f"00-{TRACE}-{ABOVE}-01"}
        assert server.http.post("/v1/completions", json=body, headers=headers).status_code == 200
        assert server.http.post("/v1/completions", json=body, headers={"x-request-id": "own-2"}).status_code == 200
        assert server.http.get("/requests/traced-1").json()["trace_id"] == TRACE
        receiver.wait(8)
        unsampled = {"x-request-id": "quiet-3", "traceparent": f"00-{TRACE}-{ABOVE}-00"}
        assert server.http.post("/v1/completions", json=body, headers=unsampled).status_code == 200
        broken = {"x-request-id": "last-4", "traceparent": "00-zz-1-01"}
        assert server.http.post("/v1/completions", json=body, headers=broken).status_code == 200
    receiver.wait(12)  # what was left was sent when the server went
    assert len(receiver.spans) == 12 and receiver.services == {"twofold"}
    spans = receiver.of("traced-1")
    top = spans["llm_request"]
    assert (top.trace_id.hex(), top.parent_span_id.hex(), top.kind) == (TRACE, ABOVE, Span.SPAN_KIND_SERVER)
    said = attributes(top)
    assert (said["gen_ai.usage.completion_tokens"], said["gen_ai.request.n"], said["gen_ai.request.max_tokens"]) == (
        12,
        2,
        6,
    )
    assert said["gen_ai.request.temperature"] == 0.5 and said["gen_ai.response.model"] == "tiny"
    assert 0 < said["gen_ai.latency.time_to_first_token"] <= said["gen_ai.latency.e2e"]
    parts = [spans[name] for name in ("queue", "prefill", "decode")]
    assert all(part.parent_span_id == top.span_id for part in parts)
    assert [part.end_time_unix_nano for part in parts[:2]] == [part.start_time_unix_nano for part in parts[1:]]
    assert top.start_time_unix_nano <= parts[0].start_time_unix_nano
    assert top.end_time_unix_nano == parts[2].end_time_unix_nano
    assert abs(top.start_time_unix_nano / 1e9 - time.time()) < 120
    assert not any(b"xylophone" in span.SerializeToString() for span in receiver.spans)
    assert receiver.of("own-2")["llm_request"].parent_span_id == b"" != receiver.of("last-4")["llm_request"].trace_id


def test_a_collector_that_is_away_or_hangs_holds_up_nobody(tiny: Path) -> None:
    import socket

    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))
        deaf.listen(8)  # takes connections and answers nothing
        url = f"http://127.0.0.1:{deaf.getsockname()[1]}"
        with served(tiny, command=ENGINE, otlp_traces_endpoint=url) as server:
            for _ in range(20):
                began = time.monotonic()
                body = {"prompt": "x", "max_tokens": 2}
                assert server.http.post("/v1/completions", json=body).status_code == 200
                assert time.monotonic() - began < 5
            began = time.monotonic()
            assert server.stop() == 0
            assert time.monotonic() - began < 12


def test_a_failure_is_an_error_of_its_span(tiny: Path, receiver: Receiver) -> None:
    with served(tiny, command=ENGINE, otlp_traces_endpoint=receiver.url, watch={"suspects": 1}) as server:
        body = {"prompt": "x", "max_tokens": 400}
        answers: list[int] = []
        asking = threading.Thread(
            target=lambda: answers.append(server.http.post("/v1/completions", json=body).status_code)
        )
        asking.start()
        server.wait(lambda: any(row["output_tokens"] for row in server.stats()["requests"]))
        server.worker.kill()
        asking.join(30)
        assert answers == [500]
    (top,) = [span for span in receiver.spans if span.name == "llm_request"]
    assert top.status.code == Status.STATUS_CODE_ERROR
    assert attributes(top)["http.response.status_code"] == 500


def test_without_the_package_the_start_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(ConfigError, match=r"twofold\[otel\]"):
        Tracing("http://127.0.0.1:4318")


@pytest.mark.parametrize("given", ["localhost:4317", "grpc://host:1", "http://", "http://host:0", "http://host:x", ""])
def test_an_endpoint_that_is_no_address_is_refused(given: str) -> None:
    with pytest.raises(ConfigError, match="otlp_traces_endpoint"):
        endpoint_of(given)


def test_the_path_of_an_endpoint_is_otlps_when_it_has_none() -> None:
    assert endpoint_of("http://host:4318/") == endpoint_of("http://host:4318") == "http://host:4318/v1/traces"
    assert endpoint_of("https://host/otlp/traces") == "https://host/otlp/traces"
