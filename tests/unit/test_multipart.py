"""A form with a file: the same parts however its bytes are cut, and a 400 for everything that is none."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from twofold.serve.batches.multipart import Multipart, Part, boundary
from twofold.serve.errors import HttpError

MARK = b"xYz-9"


def form(*parts: tuple[str, bytes]) -> bytes:
    made = b"".join(
        b'--%s\r\nContent-Disposition: form-data; name="%s"\r\n\r\n%s\r\n' % (MARK, name.encode(), body)
        for name, body in parts
    )
    return made + b"--" + MARK + b"--\r\n"


def read(data: bytes, cuts: list[int] | None = None) -> list[tuple[Part, bytes]]:
    parser, found = Multipart(MARK), list[tuple[Part, bytes]]()
    edges = [0, *sorted(cuts or []), len(data)]
    for start, end in itertools.pairwise(edges):
        for event in parser.feed(data[start:end]):
            if isinstance(event, Part):
                found.append((event, b""))
            else:
                found[-1] = (found[-1][0], found[-1][1] + event)
    parser.close()
    return found


BODIES = st.lists(
    st.one_of(st.binary(max_size=40), st.sampled_from([b"", b"\r\n", b"\r\n--", b"--" + MARK, b"\r\n--xYz-", b"\r"])),
    min_size=1, max_size=5,
)  # fmt: skip


@given(BODIES, st.lists(st.integers(0, 400), max_size=30))
def test_a_form_is_the_same_however_it_is_cut(bodies: list[bytes], cuts: list[int]) -> None:
    bodies = [body for body in bodies if b"\r\n--" + MARK not in b"\r\n" + body + b"\r\n"]
    data = form(*((f"f{n}", body) for n, body in enumerate(bodies)))
    found = read(data, [cut for cut in cuts if cut < len(data)])
    assert [(part.name, body) for part, body in found] == [(f"f{n}", body) for n, body in enumerate(bodies)]


def test_every_cut_of_one_form() -> None:
    data = form(("purpose", b"batch"), ("file", b"a\r\n--xYz\r\n\r\n"))
    whole = read(data)
    assert [body for _, body in whole] == [b"batch", b"a\r\n--xYz\r\n\r\n"]
    for cut in range(len(data)):
        assert read(data, [cut]) == whole
    assert read(data, list(range(len(data)))) == whole


def test_a_file_has_its_name() -> None:
    head = (
        b'--xYz-9\r\nContent-Type: x/y\r\nContent-Disposition: form-data; name="file"; filename="../a b.jsonl"\r\n\r\n'
    )
    ((part, body),) = read(head + b"hello\r\n--xYz-9--")
    assert part == Part("file", "../a b.jsonl") and body == b"hello"


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"--xYz-9",
        b"hello" + form(("a", b"b")),
        b"--other\r\n\r\n",
        form(("a", b"b"))[:-6],
        form(("a", b"b")) + b"more",
        form(*[("a", b"")] * 20),
        b"--xYz-9\r\nContent-Type: x\r\n\r\nbody\r\n--xYz-9--",
        b"--xYz-9\r\nnothing\r\n\r\nbody\r\n--xYz-9--",
        b"--xYz-9\r\nContent-Disposition: attachment\r\n\r\nbody\r\n--xYz-9--",
        b'--xYz-9\r\nContent-Disposition: form-data; name="a"\r\nContent-Transfer-Encoding: base64\r\n\r\n',
        b'--xYz-9 \r\nContent-Disposition: form-data; name="a"\r\n\r\nbody\r\n--xYz-9--',
        b"--xYz-9\r\n" + b"X: y\r\n" * 2000,
        b"--xYz-9\r\nX: " + b"y" * 10_000,
    ],
)
def test_what_is_no_form_is_refused(data: bytes) -> None:
    with pytest.raises(HttpError) as caught:
        read(data, list(range(0, len(data), 7)))
    assert caught.value.status == 400


@pytest.mark.parametrize("kind", ["", "multipart/form-data", "multipart/mixed; boundary=a", "x; boundary="])
def test_a_boundary_is_needed(kind: str) -> None:
    with pytest.raises(HttpError) as caught:
        boundary(kind)
    assert caught.value.status == 415
    assert (
        boundary('multipart/form-data; boundary="a b"') == b"a b"
        and boundary("Multipart/Form-Data;boundary=ab") == b"ab"
    )
