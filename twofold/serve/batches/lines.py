"""Lines: the requests of a batch's input file, checked and found again by their place in it; and those done already."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from .shapes import LineError

MAX_ERRORS = 100
MAX_CUSTOM_ID = 512


class Line(msgspec.Struct, kw_only=True):
    """One line of an input file, as OpenAI's batches have it."""

    custom_id: str
    url: str
    body: dict[str, Any]
    method: str = "POST"


class Peek(msgspec.Struct):
    model: Any = None


@dataclass(slots=True)
class Place:
    """Where a line lies: enough to find it again without keeping what it says."""

    number: int
    start: int
    size: int
    custom_id: str
    model: str


class Reply(msgspec.Struct):
    """What a line was answered."""

    status_code: int
    request_id: str
    body: msgspec.Raw


class Failure(msgspec.Struct):
    code: str
    message: str


class Result(msgspec.Struct, kw_only=True):
    """One line of an output or error file."""

    id: str
    custom_id: str
    response: Reply | None = None
    error: Failure | None = None


def index(path: Path, endpoints: Sequence[str], most: int) -> tuple[list[Place], list[LineError]]:
    """Every line's place, or what is wrong; lines of one model stand together, so that none is loaded twice."""
    places: list[Place] = []
    errors: list[LineError] = []
    seen: set[str] = set()
    start = 0
    with path.open("rb") as stream:
        for number, raw in enumerate(stream, 1):
            if raw.strip():
                if len(places) >= most:
                    return [], [LineError("too_many_lines", f"a batch has at most {most} lines", number)]
                found = _check(raw, number, endpoints, seen)
                if isinstance(found, LineError):
                    errors.append(found)
                else:
                    model = found.body.get("model")
                    places.append(
                        Place(number, start, len(raw), found.custom_id, model if isinstance(model, str) else "")
                    )
            start += len(raw)
            if len(errors) >= MAX_ERRORS:
                break
    if not places and not errors:
        errors.append(LineError("empty_file", "the file has no lines"))
    first = {place.model: n for n, place in reversed(list(enumerate(places)))}
    return sorted(places, key=lambda place: first[place.model]), errors


def _check(raw: bytes, number: int, endpoints: Sequence[str], seen: set[str]) -> Line | LineError:
    try:
        line = msgspec.json.decode(raw, type=Line)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        return LineError("invalid_json_line", f"{error}"[:300], number)
    if not 0 < len(line.custom_id) <= MAX_CUSTOM_ID:
        return LineError("invalid_custom_id", f"custom_id has 1 to {MAX_CUSTOM_ID} characters", number, "custom_id")
    if line.custom_id in seen:
        return LineError("duplicate_custom_id", f"{line.custom_id!r:.80} stands twice", number, "custom_id")
    seen.add(line.custom_id)
    if line.method != "POST":
        return LineError("invalid_method", f"method is POST, not {line.method!r:.40}", number, "method")
    if line.url not in endpoints:
        allowed = " or ".join(endpoints)
        return LineError("invalid_url", f"url is {allowed}, not {line.url!r:.80}", number, "url")
    return line


def read(path: Path, place: Place) -> Line:
    """The line at its place again."""
    with path.open("rb") as stream:
        stream.seek(place.start)
        return msgspec.json.decode(stream.read(place.size), type=Line)


def done(paths: Iterable[Path]) -> dict[str, Result]:
    """The lines that these output files answer, by custom_id; a last line without its end is cut off the file."""
    found: dict[str, Result] = {}
    for path in paths:
        if not path.exists():
            continue
        whole = 0
        with path.open("rb") as stream:
            for raw in stream:
                if not raw.endswith(b"\n"):
                    break
                whole += len(raw)
                if raw.strip():
                    result = msgspec.json.decode(raw, type=Result)
                    found[result.custom_id] = result
        if whole < path.stat().st_size:
            with path.open("r+b") as stream:
                stream.truncate(whole)
    return found
