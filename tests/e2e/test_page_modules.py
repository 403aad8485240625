"""The parts of the chat page that think: Markdown, tokens under text, and the event stream, run where they live."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from browser import Browser, chromium, missing

import twofold

pytestmark = pytest.mark.skipif(bool(missing), reason=f"needs Debian's packages: {' '.join(missing)}")

UI = Path(twofold.__file__).parent / "serve" / "ui"

MARKDOWN = """
const [source] = arguments;
return import("/ui/markdown.js").then(({ parse, draw }) => {
  const root = document.createElement("div");
  const begun = performance.now();
  root.append(...parse(source).map((block) => draw(source, block, (start, end) => [source.slice(start, end)])));
  const spent = performance.now() - begun;
  root.querySelectorAll("figcaption").forEach((node) => node.remove());
  root.querySelectorAll("*").forEach((node) => {
    for (const name of ["target", "rel", "tabindex", "aria-label", "role", "class"]) node.removeAttribute(name);
  });
  return [root.innerHTML, spent];
});
"""
CELLS = """
const [chunks] = arguments;
return import("/ui/tokens.js").then(({ Cells }) => {
  const cells = new Cells();
  for (const [text, tokens] of chunks) {
    cells.push(text, tokens.map((token) => Array.isArray(token)
      ? { token: "\\ufffd", bytes: token, logprob: -1 }
      : { token, bytes: [...new TextEncoder().encode(token)], logprob: -1 }));
  }
  cells.finish();
  const shown = cells.nodes(0, cells.text.length).map((node) => node.textContent ?? node).join("");
  return [cells.cells.map(({ start, end, tokens }) => [cells.text.slice(start, end), tokens.length]), shown];
});
"""
EVENTS = """
const [pieces] = arguments;
return import("/ui/sse.js").then(async ({ events }) => {
  const stream = new ReadableStream({
    start(controller) {
      for (const piece of pieces) controller.enqueue(new Uint8Array(piece));
      controller.close();
    },
  });
  const found = [];
  for await (const data of events(stream)) found.push(data);
  return found;
});
"""


class Handler(SimpleHTTPRequestHandler):
    """The folder under /ui, and an empty page at /: no script of the application runs here by itself."""

    def do_GET(self) -> None:
        if self.path != "/":
            return super().do_GET()
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.end_headers()
        self.wfile.write(b"<!doctype html><title>empty</title>")
        return None

    def translate_path(self, path: str) -> str:
        return super().translate_path(path.removeprefix("/ui"))

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing: a test's output is for failures."""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(UI)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        with chromium(tmp_path_factory.mktemp("chromium")) as browser:
            yield browser().open(f"http://127.0.0.1:{server.server_port}/")
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(
    ("source", "html"),
    [
        ("a **b *c* d** e", "<p>a <strong>b <em>c</em> d</strong> e</p>"),
        ("*args, **kwargs and 2*3*4", "<p>*args, **kwargs and 2*3*4</p>"),
        ("__init__ snake_case_name", "<p>__init__ snake_case_name</p>"),
        ("``c`d`` ~~x~~ \\*no\\*", "<p><code>c`d</code> <del>x</del> *no*</p>"),
        ("<img src=x onerror=alert(1)>", "<p>&lt;img src=x onerror=alert(1)&gt;</p>"),
        ("[x](javascript:alert(1))", "<p>[x](javascript:alert(1))</p>"),
        ("[y](https://a.b/c)", '<p><a href="https://a.b/c">y</a></p>'),
        ("see https://x.y/z.", '<p>see <a href="https://x.y/z">https://x.y/z</a>.</p>'),
        ("# H **b** #\ntext\nmore", "<h3>H <strong>b</strong></h3><p>text\nmore</p>"),
        (
            "- a\n- b\n  - c\n- d\n\nend",
            "<ul><li><p>a</p></li><li><p>b</p><ul><li><p>c</p></li></ul></li><li><p>d</p></li></ul><p>end</p>",
        ),
        ("3. x\n4. y", '<ol start="3"><li><p>x</p></li><li><p>y</p></li></ol>'),
        ("> q\n> > r", "<blockquote><p>q</p><blockquote><p>r</p></blockquote></blockquote>"),
        ("```py\na\n\n  <b>\n```\nafter", "<figure><pre><code>a\n\n  &lt;b&gt;</code></pre></figure><p>after</p>"),
        ("```\nstill open", "<figure><pre><code>still open</code></pre></figure>"),
        (">>> f(x)\n1\n\nend", "<figure><pre><code>&gt;&gt;&gt; f(x)\n1</code></pre></figure><p>end</p>"),
        (
            "a | b\n--- | ---\n1 | `2`",
            "<div><table><thead><tr><th>a</th><th>b</th></tr></thead><tbody><tr><td>1</td><td><code>2</code></td></tr></tbody></table></div>",
        ),
    ],
)
def test_markdown_becomes_nodes(page: Browser, source: str, html: str) -> None:
    assert page.script(MARKDOWN, source)[0] == html


@pytest.mark.parametrize(
    "source",
    [
        "*a " * 20_000,
        "**a *b " * 8_000,
        "`a ``b " * 10_000,
        "[a](" * 10_000,
        "> " * 10_000,
        "".join(" " * depth + "- x\n" for depth in range(300)),
        "|" * 20_000 + "\n|-|\n",
        "|-" * 20_000 + "\n" + "|-" * 20_000,
        "https://" * 5_000,
        "```\n" * 5_000,
        " " * 50_000 + "x",
        "#" + " #" * 20_000,
    ],
    ids=lambda source: repr(source[:6]),
)
def test_no_answer_makes_markdown_slow(page: Browser, source: str) -> None:
    """Milliseconds where a search that starts again for every mark takes minutes."""
    assert page.script(MARKDOWN, source)[1] < 2000


@pytest.mark.parametrize(
    ("chunks", "cells"),
    [
        ([["Hel", ["Hel"]], ["lo", ["lo"]]], [["Hel", 1], ["lo", 1]]),
        ([["", [[0xE2, 0x82]]], ["€", [[0xAC]]], ["!", ["!"]]], [["€", 2], ["!", 1]]),  # halves of a character
        ([["", ["ab"]], ["", ["cd"]], ["abcd", []]], [["ab", 1], ["cd", 1]]),  # text held back
        ([["ab", ["ab"]], ["S", ["STOP"]]], [["ab", 1], ["S", 1]]),  # a stop string cut the text
        ([["ab", ["<think>", "ab"]], ["", ["<eos>"]]], [["ab", 1]]),  # tokens without text
        ([["Hello you", [" Hello", " you"]]], [["Hello", 1], [" you", 1]]),  # a first space that is not shown
        ([["x\ufffdy", ["x", [0xFF], "y"]]], [["x", 1], ["\ufffd", 1], ["y", 1]]),  # a byte that is no text
        ([["plain", []]], []),
    ],
)
def test_tokens_find_their_text(page: Browser, chunks: list[Any], cells: list[Any]) -> None:
    found, shown = page.script(CELLS, chunks)
    assert found == cells
    assert shown == "".join(text for text, _ in chunks)


@pytest.mark.parametrize("size", [1, 2, 3, 5, 1000])
@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
def test_events_survive_any_cut(page: Browser, size: int, newline: str) -> None:
    lines = [": ping", "", "data: é€🙂", "", "event: x", "data:one", "data: two", "", "data: [DONE]", "", ""]
    raw = newline.join(lines).encode()
    pieces = [list(raw[at : at + size]) for at in range(0, len(raw), size)]
    # a lone last \r may still be half of \r\n, so the event that it would end is never told
    whole = ["é€🙂", "one\ntwo", "[DONE]"]
    assert page.script(EVENTS, pieces) == (whole[:2] if newline == "\r" else whole)
