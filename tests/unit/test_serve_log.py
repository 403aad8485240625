"""The server's lines: one for each event, readable by people or by machines."""

from __future__ import annotations

import json
import logging

from twofold.serve.log import JsonLines, PlainLines


def record(message: str, **extras: object) -> logging.LogRecord:
    made = logging.LogRecord("twofold.access", logging.INFO, "", 0, message, (), None)
    for name, value in extras.items():
        setattr(made, name, value)
    return made


def test_json_lines_are_one_object_a_line() -> None:
    line = JsonLines().format(record("GET /x\n200", request_id="r1", status=200, secret="s"))
    assert "\n" not in line
    found = json.loads(line)
    assert (found["message"], found["request_id"], found["status"], found["level"]) == (
        "GET /x\n200",
        "r1",
        200,
        "info",
    )
    assert "secret" not in found


def test_plain_lines_carry_the_request_id() -> None:
    assert PlainLines().format(record("hello", request_id="r1")).endswith("hello request_id=r1")
