"""What arrives before a request exists, over raw sockets: too much, too slow, two lengths, half a client."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import psutil
import pytest
from served import Served

BODY = json.dumps({"prompt": "The", "max_tokens": 2}).encode()
HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
GET = b"GET /livez HTTP/1.1\r\nHost: localhost\r\n"


@contextmanager
def connected(server: Served) -> Iterator[socket.socket]:
    with socket.create_connection((server.host, server.port), timeout=10) as sock:
        yield sock


def answer(sock: socket.socket) -> bytes:
    """Everything until the server closes; what was sent after it closed may reset the connection."""
    found = b""
    with suppress(ConnectionResetError):
        while data := sock.recv(65536):
            found += data
    return found


def send(sock: socket.socket, data: bytes) -> None:
    with suppress(BrokenPipeError, ConnectionResetError):
        sock.sendall(data)


def status(server: Served, request: bytes) -> int:
    """The status of the first answer, 0 when the connection is cut without one."""
    with connected(server) as sock:
        send(sock, request)
        line = answer(sock).split(b"\r\n")[0].split()
        return int(line[1]) if len(line) > 1 else 0


@pytest.fixture
def memory(server: Served) -> Iterator[None]:
    """The front's memory may not follow what is thrown at it."""
    front = psutil.Process(server.process.pid)
    before = front.memory_info().rss
    yield
    assert front.memory_info().rss - before < 40 * 2**20
    assert server.http.get("/livez").status_code == 200


@pytest.mark.usefixtures("memory")
@pytest.mark.parametrize(
    ("request_", "expected"),
    [
        (GET + b"X-Big: " + b"a" * 8_000_000 + b"\r\n\r\n", {431}),
        (GET + b"X-Big: " + b"a" * 40_000 + b"\r\n\r\n", {431}),
        (GET + b"".join(b"X-%d: 1\r\n" % i for i in range(20_000)) + b"\r\n", {431}),
        (GET + b"".join(b"X-%d: 1\r\n" % i for i in range(150)) + b"\r\n", {431}),
        (b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n", {431}),
        (HEAD + b"Content-Length: 90000000\r\n\r\n" + b"a" * 1_000_000, {413}),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + b"8000\r\n" + b"a" * 0x8000 + b"\r\n", {408}),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + (b"8000\r\n" + b"a" * 0x8000 + b"\r\n") * 20, {413}),
        (HEAD + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", {400}),
        (HEAD + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nhello", {400}),
        (HEAD + b"Content-Length: -5\r\n\r\nhello", {400}),
        (HEAD + b"Content-Length: 5x\r\n\r\nhello", {400}),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\nhello\r\n0\r\n\r\n", {400, 0}),
        (GET + b"Bad Header: 1\r\n\r\n", {400}),
        (GET + b" folded: 1\r\n\r\n", {400}),
        (b"GET /livez HTTP/1.1\r\nHost: evil.example\r\nConnection: close\r\n\r\n", {403}),
        (b"GET /livez HTTP/1.1\r\nConnection: close\r\n\r\n", {400}),
        (b"GET http://evil.example/livez HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n", {200}),
        (b"CONNECT localhost:1 HTTP/1.1\r\nHost: localhost\r\n\r\n", {400}),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"a" * 200, {400}),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", {400}),
        (b"\x80\x04\x95cos\nsystem\n", {400}),
    ],
    ids=[
        "header-8MB", "header-40KB", "headers-20000", "headers-150", "long-url", "length-90MB", "chunks-unfinished",
        "chunks-too-many", "length-and-chunks", "two-lengths", "negative-length", "odd-length", "bad-chunk",
        "space-in-name", "folded", "other-host", "no-host", "absolute-url", "connect", "tls", "http2", "pickle",
    ],
)  # fmt: skip
def test_probes(server: Served, request_: bytes, expected: set[int]) -> None:
    assert status(server, request_) in expected


def test_a_head_that_never_ends_is_cut(server: Served) -> None:
    with connected(server) as sock:
        began = time.monotonic()
        sock.sendall(GET)
        for _ in range(30):  # a byte now and then does not help
            time.sleep(0.1)
            send(sock, b"X")
            if time.monotonic() - began > 1.3:
                break
        assert answer(sock).startswith(b"HTTP/1.1 408")
        assert time.monotonic() - began < 30


def test_a_connection_that_says_nothing_is_cut(server: Served) -> None:
    with connected(server) as sock:
        assert answer(sock).startswith(b"HTTP/1.1 408")


def test_a_body_that_never_ends_is_cut(server: Served) -> None:
    with connected(server) as sock:
        began = time.monotonic()
        sock.sendall(HEAD + b"Content-Length: 100\r\n\r\n{")
        assert answer(sock).startswith(b"HTTP/1.1 408") and time.monotonic() - began < 30


def test_many_slow_clients_do_not_stop_a_quick_one(server: Served) -> None:
    slow = [socket.create_connection((server.host, server.port), timeout=10) for _ in range(200)]
    try:
        for sock in slow:
            sock.sendall(GET + b"X-Slow:")
        began = time.monotonic()
        assert server.http.post(
            "/v1/completions", content=BODY, headers={"Content-Type": "application/json"}
        ).is_success
        assert time.monotonic() - began < 30
        assert answer(slow[-1]).startswith(b"HTTP/1.1 408")
    finally:
        for sock in slow:
            sock.close()


def test_connections_have_a_number(server: Served) -> None:
    held = []
    try:
        for _ in range(300):
            held.append(socket.create_connection((server.host, server.port), timeout=10))
        assert answer(held[-1]).startswith(b"HTTP/1.1 503")
    finally:
        for sock in held:
            sock.close()
    server.wait(lambda: status(server, GET + b"Connection: close\r\n\r\n") == 200)


def test_trailers_are_not_headers(server: Served) -> None:
    chunk = b"%x\r\n%s\r\n0\r\n" % (len(BODY), BODY)
    with connected(server) as sock:
        sock.sendall(HEAD + b"Transfer-Encoding: chunked\r\nConnection: close\r\n\r\n" + chunk)
        sock.sendall(b"Host: evil.example\r\nX-Request-Timeout: nonsense\r\n\r\n")  # a header that is read late
        assert answer(sock).startswith(b"HTTP/1.1 200")


def test_the_rest_of_a_refused_body_is_not_a_request(server: Served) -> None:
    smuggled = b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n"
    with connected(server) as sock:
        head = b"POST /nothing HTTP/1.1\r\nHost: localhost\r\nContent-Type: text/plain\r\n"
        sock.sendall(head + b"Content-Length: %d\r\n\r\n" % (len(smuggled) + 10) + smuggled)
        found = answer(sock)
    assert found.count(b"HTTP/1.1") == 1 and b"connection: close" in found and b"415" in found.split(b"\r\n")[0]


def test_a_connection_is_kept_for_honest_clients(server: Served) -> None:
    with connected(server) as sock:
        for _ in range(3):
            sock.sendall(GET + b"\r\n")
            found = b""
            while b"alive" not in found:
                found += sock.recv(65536)
            assert found.startswith(b"HTTP/1.1 200")
        sock.sendall((GET + b"\r\n") * 3)  # pipelined
        found = b""
        while found.count(b"HTTP/1.1 200") < 3:
            found += sock.recv(65536)


def test_a_client_that_does_not_read_is_cut(server: Served) -> None:
    """Answers beyond the kernel's buffers, to a reader that never reads: the connection goes."""
    ids = list(range(3, 390)) * 100
    body = json.dumps({"tokens": ids}).encode()
    assert len(body) < 200_000
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.connect((server.host, server.port))
        request = b"POST /detokenize HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        request += b"Content-Length: %d\r\n\r\n" % len(body) + body
        mine = sock.getsockname()
        front = psutil.Process(server.process.pid)

        def held() -> bool:
            return any(tuple(c.raddr) == mine for c in front.net_connections("tcp"))

        server.wait(held)
        for _ in range(100):
            try:
                sock.settimeout(0.2)
                sock.sendall(request)
            except OSError:
                break
        server.wait(lambda: not held(), seconds=60)
    assert server.http.get("/livez").status_code == 200


def test_one_port_and_it_is_this_machines(server: Served) -> None:
    front = psutil.Process(server.process.pid)
    listening = [
        c.laddr for p in (front, server.worker) for c in p.net_connections("all") if c.status == psutil.CONN_LISTEN
    ]
    assert [(address.ip, address.port) for address in listening] == [("127.0.0.1", server.port)]
