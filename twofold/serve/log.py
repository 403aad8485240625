"""One line for each event, plain or JSON, with the request's id; never a prompt, an answer or a key."""

from __future__ import annotations

import json
import logging
import sys
import time
from typing import Literal

from .record import Record

EXTRAS = ("request_id", "trace_id", "status", "seconds", "client", "requests")

finished = logging.getLogger("twofold.requests")


class PlainLines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        extras = " ".join(f"{name}={value}" for name, value in found(record).items())
        when = time.strftime("%H:%M:%S", time.localtime(record.created))
        line = f"{when} {record.levelname.lower():<8} {record.getMessage()} {extras}".rstrip()
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


class JsonLines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": round(record.created, 3),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **found(record),
            **getattr(record, "facts", {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)


def found(record: logging.LogRecord) -> dict[str, object]:
    return {name: getattr(record, name) for name in EXTRAS if getattr(record, name, None) is not None}


def facts(record: Record) -> dict[str, object]:
    """The fields of the line that a finished request gets beside its id, its trace's and its status."""
    told, times = record.told(), record.told().timings
    found = {
        "path": told.path,
        "model": told.model,
        "adapter": told.adapter,
        "stream": told.stream,
        "prompt_tokens": told.prompt_tokens,
        "output_tokens": told.output_tokens,
        "sequences": len(told.sequences),
        "finish": ",".join(told.finish_reasons),
        "error": told.error,
        **{name: getattr(times, name) for name in times.__struct_fields__},
    }
    return {name: value for name, value in found.items() if value not in (None, "", {})}


def tell(record: Record) -> None:
    """One line for a finished request: counts and times, never content."""
    ids = {"request_id": record.id, "trace_id": record.trace_id, "status": record.status}
    finished.info("request finished", extra={**ids, "facts": facts(record)})


def set_up(kind: Literal["plain", "json"]) -> None:
    """Send the server's lines, and uvicorn's warnings, to standard error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines() if kind == "json" else PlainLines())
    for name, level in (("twofold", logging.INFO), ("uvicorn", logging.WARNING)):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level)
