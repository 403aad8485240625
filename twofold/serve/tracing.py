"""Tracing: each request as a span with vLLM's names, sent by OTLP over HTTP from a thread of its own.

    llm_request ─┬─ queue        the caller's traceparent is the parent of llm_request; what happens to spans that
                 ├─ prefill      cannot be sent is the exporter's affair, and no request waits for it
                 └─ decode

OpenTelemetry is the extra `twofold[otel]`, and imported only when an endpoint is given.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
import urllib.parse
from typing import TYPE_CHECKING, Any

from ..core import ConfigError
from .ledger import Ledger
from .record import Record

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter

log = logging.getLogger("twofold.serve")

PATH = "/v1/traces"
EVERY_MS = 1000
SEND_SECONDS = 5
LEAVE_SECONDS = 3.0


class Tracing:
    """Spans of every record of the ledgers that it is told of. `exporter` takes the endpoint's place.

    Raises:
        ConfigError: OpenTelemetry is not installed, or the endpoint is no address.
    """

    def __init__(self, endpoint: str, exporter: SpanExporter | None = None) -> None:
        address = endpoint_of(endpoint)
        try:
            from opentelemetry import trace
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ImportError as error:
            raise ConfigError(
                f"otlp_traces_endpoint needs OpenTelemetry ({error}): pip install 'twofold[otel]', or leave it out"
            ) from None
        self._api = trace
        name = os.environ.get("OTEL_SERVICE_NAME", "twofold")
        self._provider = TracerProvider(resource=Resource.create({"service.name": name}), shutdown_on_exit=False)
        sender = exporter or OTLPSpanExporter(endpoint=address, timeout=SEND_SECONDS)
        self._provider.add_span_processor(BatchSpanProcessor(sender, schedule_delay_millis=EVERY_MS))
        self._tracer = self._provider.get_tracer("twofold.serve")

    def watch(self, ledger: Ledger) -> None:
        ledger.began.append(self._guarded(self.begin))
        ledger.ended.append(self._guarded(self.end))

    def begin(self, record: Record) -> None:
        """Open the span of a request, below the caller's."""
        trace, context = self._api, None
        if record.parent is not None:
            trace_id, span_id, flags = record.parent
            above = trace.SpanContext(int(trace_id, 16), int(span_id, 16), True, trace.TraceFlags(flags))
            context = trace.set_span_in_context(trace.NonRecordingSpan(above))
        began = _nanoseconds(record, record.began)
        span = self._tracer.start_span("llm_request", context, kind=trace.SpanKind.SERVER, start_time=began)
        record.span, record.trace_id = span, format(span.get_span_context().trace_id, "032x")

    def end(self, record: Record) -> None:
        """Close it, with what became of the request."""
        span, record.span = record.span, None
        if span is None:  # refused before it began
            return
        inside = self._api.set_span_in_context(span)
        _, *marks = (_nanoseconds(record, mark) for mark in record.instants)
        for name, start, end in zip(("queue", "prefill", "decode"), marks, marks[1:]):
            self._tracer.start_span(name, inside, start_time=start).end(end)
        span.set_attributes(attributes(record))
        if record.error is not None:
            span.set_status(self._api.StatusCode.ERROR, record.error)
        span.end(marks[-1])

    def flush(self) -> None:
        """Send what is there, and wait for it."""
        self._provider.force_flush(int(1000 * LEAVE_SECONDS))

    async def stop(self) -> None:
        """Send what is left, within a few seconds."""
        leaving = threading.Thread(target=self._provider.shutdown, name="tracing-shutdown", daemon=True)
        leaving.start()
        until = time.monotonic() + LEAVE_SECONDS
        while leaving.is_alive() and time.monotonic() < until:
            await asyncio.sleep(0.02)

    def _guarded(self, work: Any) -> Any:
        def safe(record: Record) -> None:
            try:
                work(record)
            except Exception:
                log.exception("tracing failed, the request goes on", extra={"request_id": record.id})

        return safe


def attributes(record: Record) -> dict[str, Any]:
    """What a span says, under vLLM's names where vLLM has one; nothing that is None."""
    told, asked = record.told(), record.asked
    times = told.timings
    found: dict[str, Any] = {
        "gen_ai.request.id": told.id,
        "gen_ai.request.model": told.adapter or told.model,
        "gen_ai.response.model": told.model,
        "gen_ai.usage.prompt_tokens": told.prompt_tokens,
        "gen_ai.usage.completion_tokens": told.output_tokens,
        "gen_ai.usage.num_sequences": len(told.sequences),
        "gen_ai.latency.time_in_queue": times.queue_seconds,
        "gen_ai.latency.time_to_first_token": times.first_token_seconds,
        "gen_ai.latency.e2e": times.total_seconds,
        "gen_ai.latency.time_in_scheduler": times.queue_seconds,
        "gen_ai.latency.time_in_model_prefill": times.prefill_seconds,
        "gen_ai.latency.time_in_model_decode": times.decode_seconds,
        "gen_ai.latency.time_in_model_inference": round(times.prefill_seconds + times.decode_seconds, 6),
        "http.response.status_code": told.status,
        "twofold.cached_tokens": times.cached_tokens,
        "twofold.preemptions": times.preemptions,
        "twofold.restarts": times.restarts,
        "twofold.drafted_tokens": times.drafted_tokens,
        "twofold.accepted_tokens": times.accepted_tokens,
    }
    found |= {f"gen_ai.request.{name}": asked.get(name) for name in ("max_tokens", "top_p", "temperature", "n")}
    found |= {f"twofold.wait.{reason}": seconds for reason, seconds in times.waits.items()}
    if told.finish_reasons:
        found["gen_ai.response.finish_reasons"] = told.finish_reasons
    return {name: value for name, value in found.items() if value is not None}


def endpoint_of(given: str) -> str:
    """The address that traces are sent to: OTLP's own path where none is given.

    Raises:
        ConfigError: it is no http address.
    """
    try:
        url = urllib.parse.urlsplit(given)
        known = url.scheme in ("http", "https") and url.hostname and url.port != 0
    except ValueError:
        known = False
    if not known:
        raise ConfigError(f"otlp_traces_endpoint is like http://127.0.0.1:4318{PATH}, not {given!r}")
    return given if url.path.strip("/") else f"{given.rstrip('/')}{PATH}"


def _nanoseconds(record: Record, mark: float) -> int:
    return int((record.created_at + mark - record.began) * 1e9)
