"""What every machine with Python has to read: the standard library's source, and what its functions say of themselves.

Source is read as text and parsed with `ast`; none of it is imported, but for a few modules written in C, whose
documentation strings are nowhere else. What is found depends on the Python that runs: another version, another text.
"""

from __future__ import annotations

import ast
import inspect
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from .dataset import SOURCES, Document, Text

_SKIPPED_FOLDERS = {
    *("test", "tests", "idle_test", "idlelib", "lib2to3", "encodings", "pydoc_data", "turtledemo", "distutils"),
    *("ensurepip", "msilib", "site-packages", "dist-packages", "__pycache__", "lib-dynload", "__phello__"),
}
_SKIPPED_FILES = {"html/entities.py", "this.py", "antigravity.py", "__hello__.py"}  # tables and jokes
_LARGEST = 250_000  # bytes: what is larger is a table
_IN_C = ("builtins", "math", "itertools", "time", "sys", "_collections", "_functools", "posix")
_KNOWN_AS = {
    "posixpath": "os.path",
    "genericpath": "os.path",
    "_collections_abc": "collections.abc",
    "posix": "os",
    "_collections": "collections",
    "_functools": "functools",
    "_weakrefset": "weakref",
}
_TYPES = ("str", "list", "dict", "set", "tuple", "int", "float", "bytes", "frozenset")
_SIGNATURE = re.compile(r"^[\w.]+\([^()]*(?:\([^()]*\)[^()]*)*\)\s*(?:(->|--|:)\s*|$)")


@dataclass(frozen=True, slots=True)
class Entry:
    """What one module, class or function says of itself: `signature` is "(a, b=1)", "" for modules and classes."""

    name: str
    kind: str
    signature: str
    summary: str


def library() -> Path:
    """The folder of the running Python's standard library."""
    return Path(os.__file__).parent


def source_files(root: Path | None = None) -> list[Path]:
    """The library's source files, sorted by path: no tests, no tables, nothing that was installed later."""
    root = root or library()
    found = []
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in _SKIPPED_FOLDERS and not name.startswith("config-")]
        for name in files:
            path = Path(folder) / name
            plain = path.relative_to(root).as_posix()
            if name.endswith(".py") and plain not in _SKIPPED_FILES and not name.startswith("_sysconfigdata"):
                found.append((plain, path))
    return [path for _, path in sorted(found) if path.stat().st_size <= _LARGEST]


@SOURCES.register("python-stdlib")
def stdlib_source() -> Iterator[Document]:
    """Every source file as one text, held out by its path."""
    root = library()
    for path in source_files(root):
        text = _read(path)
        if text.strip():
            yield Document(Text(text), key=path.relative_to(root).as_posix())


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return path.read_text(encoding="latin-1")


# ------------------------------------------------------------------------------------------------- entries
def entries() -> list[Entry]:
    """Everything public that documents itself, by name; of two with one name the first stays."""
    found: dict[str, Entry] = {}
    for entry in (*_from_c(), *_from_source()):
        found.setdefault(entry.name, entry)
    return [found[name] for name in sorted(found)]


def _from_source() -> Iterator[Entry]:
    root = library()
    for path in source_files(root):
        parts = path.relative_to(root).with_suffix("").parts
        plain = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        name = _KNOWN_AS.get(plain, plain)
        if any(part.startswith("_") for part in name.split(".")) or plain in ("ntpath", "idlelib"):
            continue
        try:
            tree = ast.parse(_read(path))
        except (SyntaxError, ValueError):
            continue
        if name == plain and (text := summary(ast.get_docstring(tree))):
            yield Entry(name, "module", "", text)
        yield from _walk(tree, name)
        if name == "random":  # its functions are the methods of one hidden Random
            methods = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Random")
            yield from _walk(methods, name)


def _walk(tree: ast.Module | ast.ClassDef, prefix: str) -> Iterator[Entry]:
    for node in tree.body:
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) or node.name.startswith("_"):
            continue
        name, text = f"{prefix}.{node.name}", summary(ast.get_docstring(node))
        if isinstance(node, ast.ClassDef):
            if text:
                yield Entry(name, "class", "", text)
            yield from _walk(node, name)
        elif text:
            kind = "method" if isinstance(tree, ast.ClassDef) and prefix != "random" else "function"
            yield Entry(name, kind, _arguments(node.args), text)


def _arguments(given: ast.arguments) -> str:
    """A signature without annotations and without `self`."""
    for argument in ast.walk(given):
        if isinstance(argument, ast.arg):
            argument.annotation = None
    text = ast.unparse(given)
    return f"({re.sub(r'^(self|cls)(, /)?(, |$)', '', text)})"


def _from_c() -> Iterator[Entry]:
    for module in _IN_C:
        try:
            home = import_module(module)
        except ImportError:  # posix, on a machine that is not
            continue
        prefix = "" if module == "builtins" else _KNOWN_AS.get(module, module) + "."
        if prefix == f"{module}." and (text := summary(home.__doc__)):
            yield Entry(module, "module", "", text)
        for name, thing in sorted(vars(home).items()):
            if name.startswith("_") or not callable(thing) or (isinstance(thing, type) and _is_error(thing)):
                continue
            kind = "class" if isinstance(thing, type) and not (name in _TYPES or prefix == "itertools.") else "function"
            yield from _described(prefix + name, kind, thing)
            if isinstance(thing, type) and (name in _TYPES or module == "_collections"):
                for part, method in sorted(vars(thing).items()):
                    if not part.startswith("_") and callable(method):
                        yield from _described(f"{prefix}{name}.{part}", "method", method)


def _is_error(kind: type) -> bool:
    return issubclass(kind, BaseException)


def _described(name: str, kind: str, thing: object) -> Iterator[Entry]:
    text = summary(thing.__doc__)
    if not text:
        return
    try:
        plain = str(inspect.signature(thing))  # type: ignore[arg-type]
    except (ValueError, TypeError):
        plain = ""
    plain = re.sub(r"\$?\b(self|module)\b(, )?|, /|/, ", "", plain.split(" ->")[0]).replace("(/)", "()")
    yield Entry(name, kind, plain if len(plain) < 120 else "", text)


def summary(doc: str | None) -> str:
    """The first one to three sentences of a documentation string, "" when they say too little.

    Signatures that old C documentation starts with are dropped: "D.keys() -> a view" becomes "Return a view."
    """
    returned = ""
    for paragraph in re.split(r"\n\s*\n", inspect.cleandoc(doc or "")):
        lines = [line.strip() for line in paragraph.splitlines() if line.strip()]
        while lines and (match := _SIGNATURE.match(lines[0])):
            rest = lines[0][match.end() :]
            told = re.sub(r"^(None|v)\b(\.|, or)?[,.]?\s*", "", rest)
            lines[:1] = [told] if told and (match[1] != "->" or told != rest) else []
            if match[1] == "->" and told == rest and not returned:
                returned = _sentence(f"Return {rest}")
        text = re.sub(r"^(Module )?[\w.]+ --? ", "", " ".join(" ".join(lines).split()))  # "csv.py - read CSV files"
        if len(text) >= 12 and text[0].isalpha() and ">>>" not in text:
            return _sentence(text)
    return returned


def _sentence(text: str) -> str:
    """Up to three sentences of `text`, 240 characters, starting large and ending in a mark."""
    return _shorten(text[0].upper() + text[1:])


def _shorten(text: str, most: int = 240) -> str:
    sentences = re.split(r"(?<=[.!?])\s+(?=[A-Z])", text)
    kept = sentences[0]
    for sentence in sentences[1:3]:
        if len(kept) + len(sentence) < most:
            kept += " " + sentence
    if len(kept) > most:
        kept = kept[:most].rsplit(" ", 1)[0].rstrip(",;:")
    return kept.rstrip(":;, ") + ("" if kept.endswith((".", "!", "?")) else ".")
