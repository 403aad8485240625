"""The parts of the pages that think, run where they live: Markdown, tokens, the event stream, curves, what happened."""

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
SERIES = """
const [name, ...args] = arguments;
return import("/ui/series.js").then((series) => series[name](...args));
"""
HAPPENED = """
const [rows] = arguments;
return import("/ui/events.js").then(({ Events }) => {
  const events = new Events();
  rows.forEach((row) => events.add(row));
  return events.all([{ step: 10, time: 10 }]).map(({ step, kind, words }) => [step, kind, words]);
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


@pytest.mark.parametrize(
    ("name", "args", "value"),
    [
        ("smooth", [[4, 4, 4], 0.9], [4, 4, 4]),  # no pull towards zero at the beginning
        ("smooth", [[1, None, 3], 0.5], [1, None, (0.25 * 1 + 0.5 * 3) / 0.75]),
        ("smooth", [[1, 7, 2], 0], [1, 7, 2]),
        ("ticks", [0, 10, 5], [0, 2, 4, 6, 8, 10]),
        ("ticks", [0.13, 0.31, 4], [0.15, 0.2, 0.25, 0.3]),
        ("ticks", [3, 3, 4], [3]),
        ("ticks", [2**30, 3 * 2**30, 2, 2**30], [2**30, 2 * 2**30, 3 * 2**30]),
        ("logTicks", [0.002, 30, 4], [0.01, 0.1, 1, 10]),
        ("logTicks", [0.9, 30, 8], [1, 2, 5, 10, 20]),
        ("logTicks", [2, 4, 4], [2, 2.5, 3, 3.5, 4]),
        ("nearest", [[[1, 0], [2, 0], [5, 0]], 3.4], 1),
        ("nearest", [[[1, 0], [2, 0], [5, 0]], 99], 2),
        ("median", [[3, 1, 2, 10]], 2.5),
        ("number", [0.00075], "7.5e-4"),
        ("number", [14234], "14.2k"),
        ("number", [0], "0"),
        ("precise", [2.5], "2.5000"),
        ("gibibytes", [1536 * 2**20], "1.5 GiB"),
        ("duration", [0.2], "0 s"),
        ("duration", [7330], "2 h 2 min"),
        ("duration", [90000, 1], "1 d"),
    ],
)
def test_numbers_along_a_run(page: Browser, name: str, args: list[Any], value: Any) -> None:
    found = page.script(SERIES, name, *args)
    assert found == (pytest.approx(value) if name in ("smooth", "ticks") and None not in value else value)


def test_a_thinned_line_keeps_its_ends_and_its_peaks(page: Browser) -> None:
    points = [[x, (x * 7919) % 101] for x in range(5000)]
    points[1234][1], points[4321][1] = 1000, -1000
    kept = page.script(SERIES, "thin", points, 50)
    assert len(kept) <= 4 * 51
    assert kept == sorted(kept, key=lambda point: point[0])
    assert [point for point in kept if point not in points] == []
    for point in (points[0], points[1234], points[4321], points[-1]):
        assert point in kept
    assert page.script(SERIES, "thin", points[:150], 50) == points[:150]


def test_what_happened_is_found_in_the_rows(page: Browser) -> None:
    rows: list[dict[str, Any]] = [{"step": s, "loss": 2 + 0.01 * (s % 3), "time": s} for s in range(1, 40)]
    rows[24]["loss"] = rows[25]["loss"] = 6.0
    rows += [
        {"step": 40, "valid_loss": 2.5, "time": 40},
        {"step": 41, "skipped": "the gradient is not finite", "time": 41},
        {"step": 42, "loss": 2.0, "loss_scale": 8.0, "time": 500},
        {"step": 43, "loss": 2.0, "loss_scale": 4.0, "time": 501},
        {"step": 44, "prompt": "a", "text": "b", "time": 502},
        {"step": 45, "valid_loss": 2.75, "time": 503},
        {"step": 46, "valid_loss": None, "time": 504},
        {"step": 47, "rank": "left", "time": 505},
    ]
    assert page.script(HAPPENED, rows) == [
        [10, "checkpoint", "checkpoint on the disk"],
        [25, "spike", "loss 6.0000 where 2.0100 was usual"],
        [40, "valid", "validation loss 2.5000"],
        [41, "skipped", "skipped: the gradient is not finite"],
        [42, "pause", "went on after 7 min 39 s without a row"],
        [43, "scale", "loss scale 8 to 4"],
        [45, "valid", "validation loss 2.7500, 0.25 over that of step 40"],
        [46, "valid", "validation loss is not a number"],
        [47, "note", "rank: left"],
    ]
