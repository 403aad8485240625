"""The library's short functions with the end of their last line to be filled in: the source "python-functions".

    def __len__(self):                 prompt
        return len(self.data)          `    return len(` is the prompt's end, `self.data)` the completion

Functions stand alone, without the file around them, as a user would give them; held out by their file.
"""

from __future__ import annotations

import ast
import hashlib
import io
import textwrap
import tokenize
from collections.abc import Iterator

from .dataset import SOURCES, Completion, Document
from .stdlib import library, source_files

LONGEST = 400
"""Characters of a function that is short."""
HIDDEN = 4
"""Tokens of the last line that may be left to fill in."""
_EXERCISES = {"operator.py", "_pydecimal.py"}
"""operator.py is a list of one-line exercises, which evaluations ask too; _pydecimal.py alone would be a twentieth."""


@SOURCES.register("python-functions")
def python_functions() -> Iterator[Document]:
    """Every short function once, cut somewhere in the last tokens of its last line."""
    seen: set[str] = set()
    for path in source_files():
        name = path.relative_to(library()).as_posix()
        if name in _EXERCISES:
            continue
        for code in short_functions(path.read_text(encoding="utf-8", errors="replace")):
            cut = place_to_cut(code)
            if cut is not None and code not in seen:
                seen.add(code)
                yield Document(Completion(code[:cut], code[cut:]), key=name)


def short_functions(text: str) -> Iterator[str]:
    """The functions of a file that are short and end with a statement of one line, dedented."""
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError):
        return
    lines = text.splitlines()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and node.body and not node.decorator_list:
            last = _last(node)
            code = textwrap.dedent("\n".join(lines[node.lineno - 1 : node.end_lineno]))
            if last.lineno == last.end_lineno and last.lineno > node.lineno and len(code) <= LONGEST:
                yield code


def place_to_cut(code: str) -> int | None:
    """Behind which character of a function its completion begins: always the same one, None where nothing is left."""
    start = code.rfind("\n") + 1
    line = code[start:]
    try:
        found = list(tokenize.generate_tokens(io.StringIO(line.strip()).readline))
    except (tokenize.TokenError, SyntaxError):
        return None
    words = [word for word in found if word.string.strip() and word.type != tokenize.COMMENT]
    if len(words) < 2 or len(words) < len([word for word in found if word.string.strip()]):
        return None
    ends = [word.end[1] for word in words[:-1]][-HIDDEN:]
    pick = int.from_bytes(hashlib.sha256(code.encode()).digest()[:4], "big") % len(ends)
    return start + len(line) - len(line.lstrip()) + ends[pick]


def _last(node: ast.FunctionDef) -> ast.stmt:
    """The innermost statement that a function ends with."""
    last: ast.stmt = node
    while True:
        inner = [it for it in ast.iter_child_nodes(last) if isinstance(it, ast.stmt | ast.ExceptHandler)]
        if not inner:
            return last
        furthest = max(inner, key=lambda it: (it.end_lineno or 0, it.lineno))
        if isinstance(furthest, ast.ExceptHandler):
            furthest = furthest.body[-1]
        last = furthest
