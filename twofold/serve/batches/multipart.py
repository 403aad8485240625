"""Multipart: a form with a file, read strictly and as it comes, so that no file is ever whole in memory.

    --B CRLF headers CRLF CRLF body CRLF --B CRLF headers ... CRLF --B--

Only what clients send is understood: no text before the first boundary, no nested parts, no transfer encodings.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from ..errors import HttpError

MAX_HEAD = 4096
MAX_PARTS = 16
CONTENT_TYPE = re.compile(r'multipart/form-data;\s*boundary=(?:"([^"\r\n]{1,70})"|([^\s";,]{1,70}))\s*', re.IGNORECASE)
DISPOSITION = re.compile(
    r'form-data;\s*name="(?P<name>[^"\r\n]{1,100})"(?:;\s*filename="(?P<file>[^"\r\n]{0,255})")?', re.IGNORECASE
)


@dataclass(frozen=True, slots=True)
class Part:
    """The head of a part; `filename` None for a plain field."""

    name: str
    filename: str | None


def boundary(content_type: str) -> bytes:
    """The boundary that a Content-Type names; HttpError 415 when it is no form."""
    match = CONTENT_TYPE.fullmatch(content_type.strip())
    if match is None:
        raise HttpError(415, "send a form: 'Content-Type: multipart/form-data; boundary=...'", code="content_type")
    return (match[1] or match[2]).encode("latin-1")


class Multipart:
    """Fed with bytes, it tells of a part's head, then of its bytes; `done` once the last boundary has come."""

    def __init__(self, boundary: bytes) -> None:
        self._mark = b"\r\n--" + boundary
        self._buffer = bytearray(b"\r\n")  # so that the first boundary looks like the others
        self._in_body = False
        self._parts = 0
        self.done = False

    def feed(self, data: bytes) -> Iterator[Part | bytes]:
        """What these bytes complete; HttpError 400 where they are no form."""
        if self.done and data.strip(b"\r\n"):
            raise _bad("there is more after its end")
        self._buffer += data
        while not self.done:
            if self._in_body:
                end = self._buffer.find(self._mark)
                ready = end if end >= 0 else len(self._buffer) - len(self._mark) + 1
                if ready > 0:
                    yield bytes(self._buffer[:ready])
                    del self._buffer[:ready]
                if end < 0:
                    return
                self._in_body = False
            part = self._head()
            if part is None:
                return
            yield part

    def close(self) -> None:
        """No more bytes come; HttpError 400 when some are missing."""
        if not self.done:
            raise _bad("it stops in the middle")

    def _head(self) -> Part | None:
        """The boundary and the headers behind it, once they are all there."""
        start = len(self._mark)
        if not self._mark.startswith(self._buffer[:start]) and not self._buffer.startswith(self._mark):
            raise _bad("it does not begin with its boundary")
        if self._buffer[start : start + 2] == b"--":
            self.done = True
            return None
        end = self._buffer.find(b"\r\n\r\n", start)
        if end < 0:
            if len(self._buffer) > start + MAX_HEAD:
                raise _bad(f"the head of a part is more than {MAX_HEAD} bytes")
            return None
        if self._buffer[start : start + 2] != b"\r\n":
            raise _bad("a boundary is followed by something else")
        head = bytes(self._buffer[start + 2 : end])
        del self._buffer[: end + 4]
        self._parts += 1
        if self._parts > MAX_PARTS:
            raise _bad(f"it has more than {MAX_PARTS} parts")
        self._in_body = True
        return _part(head)


def _part(head: bytes) -> Part:
    found: Part | None = None
    for line in head.split(b"\r\n"):
        name, colon, value = line.partition(b":")
        if not colon:
            raise _bad("a part's header has no colon")
        kind = name.strip().lower()
        if kind == b"content-transfer-encoding" and value.strip().lower() not in (b"binary", b"8bit", b"7bit"):
            raise _bad("a part is encoded: send its bytes as they are")
        if kind == b"content-disposition":
            match = DISPOSITION.fullmatch(value.decode("utf-8", "replace").strip())
            if match is None or found is not None:
                raise _bad("a part has one Content-Disposition, of form-data, with a name")
            found = Part(match["name"], match["file"])
    if found is None:
        raise _bad("a part has no Content-Disposition")
    return found


def _bad(why: str) -> HttpError:
    return HttpError(400, f"the form cannot be read: {why}", code="bad_form")
