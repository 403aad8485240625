"""The pages are small, of this repository alone, and made so that no text can become markup or script."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

import twofold

FOLDER = Path(twofold.__file__).parent / "serve" / "ui"
FILES = sorted(path for path in FOLDER.rglob("*") if path.is_file())
SCRIPTS = [path for path in FILES if path.suffix == ".js"]
HTML = [path for path in FILES if path.suffix == ".html"]
STYLES = [path for path in FILES if path.suffix == ".css"]
MOST_BYTES = 190 * 1024  # of all pages: chat, overview, and training with alignment

# what would turn text into markup, or text into a program, or needs a policy looser than default-src 'self'
MARKUP = re.compile(
    r"innerHTML|outerHTML|insertAdjacentHTML|createContextualFragment|DOMParser|document\.write|srcdoc"
    r"|\beval\(|new Function"
    r"|setAttribute\(\s*[\"'](?:style|on)|javascript:"
)
ELSEWHERE = re.compile(r"""(?:from|import\(?|url\(|@import|fetch\()\s*["'`]?(?:https?:)?//""")


class Page(HTMLParser):
    """Collects what a strict content policy refuses, the addresses asked for, and the ids."""

    def __init__(self) -> None:
        super().__init__()
        self.refused: list[str] = []
        self.addresses: list[str] = []
        self.ids: list[str] = []
        self.named: list[str] = []
        self._inside = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._inside = tag
        for name, value in attrs:
            if name == "style" or name.startswith("on"):
                self.refused.append(f"<{tag} {name}>")
            if name in ("src", "href"):
                self.addresses.append(value or "")
            if name == "id":
                self.ids.append(value or "")
            if name in ("for", "aria-controls", "aria-labelledby", "aria-describedby"):
                self.named.append(value or "")

    def handle_data(self, data: str) -> None:
        if self._inside in ("script", "style") and data.strip():
            self.refused.append(f"inline <{self._inside}>")

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""


def parsed(path: Path) -> Page:
    parser = Page()
    parser.feed(path.read_text(encoding="utf-8"))
    return parser


def loaded(path: Path) -> set[str]:
    """The scripts that a page loads, and those that these import."""
    found: set[str] = set()
    left = [address for address in parsed(path).addresses if address.endswith(".js")]
    while left:
        name = left.pop().removeprefix("/ui/")
        if name not in found:
            found.add(name)
            left += re.findall(r'from "(/ui/[^"]+)"', (FOLDER / name).read_text(encoding="utf-8"))
    return found


@pytest.fixture(params=HTML, ids=lambda path: path.name)
def page(request: pytest.FixtureRequest) -> Page:
    return parsed(request.param)


def test_the_page_is_small() -> None:
    assert sum(path.stat().st_size for path in FILES) < MOST_BYTES


def test_nothing_inline_and_nothing_from_elsewhere(page: Page) -> None:
    assert not page.refused
    served = {"/", "/overview", "/train"} | {f"/ui/{path.relative_to(FOLDER)}" for path in FILES}
    assert not [a for a in page.addresses if not a.startswith("#") and a not in served]


def test_every_file_is_of_a_page() -> None:
    styles = {a.removeprefix("/ui/") for path in HTML for a in parsed(path).addresses if a.endswith(".css")}
    assert styles == {path.name for path in STYLES}
    assert set.union(*map(loaded, HTML)) == {path.name for path in SCRIPTS}


def test_what_the_page_refers_to_is_there(page: Page) -> None:
    assert len(page.ids) == len(set(page.ids))
    inside = [address[1:] for address in page.addresses if address.startswith("#")]
    assert not set(inside + page.named) - set(page.ids)


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_make_nodes_not_markup(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert not MARKUP.search(re.sub(r"(?s:/\*.*?\*/)|// .*", "", text))  # comments may name what is left out
    assert not ELSEWHERE.search(text)


@pytest.mark.parametrize("path", STYLES, ids=lambda path: path.name)
def test_styles_ask_for_nothing(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"url\(|@import|expression\(", text)


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_imports_and_ids_are_real(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    for address in re.findall(r'from "(/ui/[^"]+)"', text):
        assert (FOLDER / address.removeprefix("/ui/")).is_file(), address
    for html in [html for html in HTML if path.name in loaded(html)]:
        ids = parsed(html).ids
        for name in re.findall(r'(?:\$|getElementById)\("([\w-]+)"\)', text):
            assert name in ids, f"{html.name} has no {name}"
        for name in re.findall(r'icon(?:Button)?\("(\w+)"', text):
            assert f"i-{name}" in ids, f"{html.name} has no icon {name}"


@pytest.mark.parametrize("line", ["node.innerHTML = text", "el.setAttribute('style', s)", "new Function(text)"])
def test_the_search_finds_what_it_looks_for(line: str) -> None:
    assert MARKUP.search(line)
