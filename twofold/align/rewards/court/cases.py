"""What counts as one test, and the tests as a module in which each of them is fenced off from the others.

    ["assert f(1) == 2", ...]       each snippet
    "assert f(1) == 2\n..."         each assert at the top; what stands between is set-up
    "def test_x(): ..."             each such function, called
    "class TestX(TestCase): ..."    each such method, of unittest's classes and of plain ones
    "def check(candidate): ..."     HumanEval's: each assert at its top, `candidate` being the entry point

A fenced statement stands in `with __case__(number):`, which swallows what it raises and notes whether it passed.

Which names of the tests are the candidate's (`Names`): those that neither they nor the language nor its library
define; the entry point; a name of the library's that is used as no module can be; and the one name of the language's
where the tests use no other.
"""

from __future__ import annotations

import ast
import builtins
import sys
from collections.abc import Sequence
from typing import NamedTuple

CASE = "__case__"
ENTRY = "__entry__"
"""The entry point's name in the tests, where they define its own anew."""
SOLUTION = "solution"
"""`from solution import f`: the module that a candidate is."""


class Names(NamedTuple):
    """Names that tests use and do not bind."""

    asked: frozenset[str]
    """What the candidate has to define, though Python has something of that name."""
    modules: frozenset[str]
    """Modules of the library that are used without an import."""
    kinds: frozenset[str]
    """What is written as a class is."""


def names(source: str, entry: str | None) -> Names:
    """The names of arranged tests.

    Raises ValueError where only functions of the language are tested, and nobody says which.
    """
    nodes = list(ast.walk(ast.parse(source)))
    bound = {node.id for node in nodes if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load)}
    bound |= {node.arg for node in nodes if isinstance(node, ast.arg)} | {CASE}
    bound |= {n.name for n in nodes if isinstance(n, ast.FunctionDef | ast.ClassDef | ast.ExceptHandler) if n.name}
    imported = [a for node in nodes if isinstance(node, ast.Import | ast.ImportFrom) for a in node.names]
    bound |= {(alias.asname or alias.name).partition(".")[0] for alias in imported}
    free = {node.id for node in nodes if isinstance(node, ast.Name)} - bound
    bases = {node.value for node in nodes if isinstance(node, ast.Attribute)}
    alone = {node.id for node in nodes if isinstance(node, ast.Name) and node not in bases}
    library = free & set(sys.stdlib_module_names)
    told = {entry} & free if entry else set()
    plain = {name for name in free - told - library if hasattr(builtins, name) and not _error(name)}
    foreign = {name for name in free if not hasattr(builtins, name) and name not in library - alone}
    solved = any(isinstance(node, ast.ImportFrom) and node.module == SOLUTION for node in nodes)
    own = set[str]()
    if not (foreign or told or solved or bound & {SOLUTION}):
        if len(plain) > 1:
            raise ValueError(
                f"was given tests of {', '.join(sorted(plain))}: name the one that is asked for as the entry"
            )
        own = plain
    kinds = {name for name in free if name[0].isupper() and (len(name) == 1 or not name.isupper())}
    return Names(frozenset(told | own | library & alone), frozenset(library - alone - told), frozenset(kinds))


def _error(name: str) -> bool:
    kind = getattr(builtins, name)
    return isinstance(kind, type) and issubclass(kind, BaseException)


def arrange(tests: str | Sequence[str], entry: str | None) -> tuple[str, int]:
    """The source of the module and the number of tests in it.

    Raises ValueError where the tests are not Python, or where there is nothing in them that could fail.
    """
    if entry == "check":
        entry = ENTRY
    if isinstance(tests, str):
        return _script(_parsed(tests), entry)
    body: list[ast.stmt] = []
    for number, snippet in enumerate(tests):
        statements = _parsed(snippet)
        calls = [call for s in statements for call in _calls(s, None if _called(statements) else entry)]
        body.append(_fenced(number, _acting(statements + calls)))
    return _source(body), len(tests)


def _parsed(text: str) -> list[ast.stmt]:
    try:
        return ast.parse(text).body
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
        raise ValueError(f"was given tests that are not Python: {error}") from None


def _acting(statements: list[ast.stmt]) -> list[ast.stmt]:
    """The statements, of which one at least does more than define or import: else every candidate would pass."""
    idle = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Import, ast.ImportFrom, ast.Pass)
    if all(isinstance(statement, idle) for statement in statements):
        raise ValueError("was given tests in which there is nothing that could fail")
    return statements


def _script(statements: list[ast.stmt], entry: str | None) -> tuple[str, int]:
    body: list[ast.stmt] = []
    called = _called(statements)
    count = 0
    for statement in statements:
        if isinstance(statement, ast.Assert):
            body.append(_fenced(count, [statement]))
            count += 1
            continue
        body.append(statement)
        if isinstance(statement, ast.FunctionDef) and statement.name == "check" and (entry or called):
            count = _fence_asserts(statement, count)
            body += [] if called else [_fenced(-1, _calls(statement, entry))]
            continue
        for call in _calls(statement, None):
            body.append(_fenced(count, [call]))
            count += 1
    if count == 0:
        return _source([_fenced(0, _acting(body))]), 1
    return _source(body), count


def _called(statements: list[ast.stmt]) -> bool:
    """Whether the tests call their `check` themselves."""
    return any(
        isinstance(s, ast.Expr) and isinstance(s.value, ast.Call) and getattr(s.value.func, "id", None) == "check"
        for s in statements
    )


def _calls(statement: ast.stmt, entry: str | None) -> list[ast.stmt]:
    """The calls that a definition waits for: test functions, methods of test classes, a check of the entry point."""
    if isinstance(statement, ast.FunctionDef):
        if statement.name == "check" and entry:
            return _parsed(f"check({entry})")
        return _parsed(f"{statement.name}()") if statement.name.startswith("test") else []
    if not isinstance(statement, ast.ClassDef):
        return []
    name = statement.name
    cases = any("TestCase" in ast.unparse(base) for base in statement.bases)
    if not cases and not name.startswith("Test"):
        return []
    methods = [s.name for s in statement.body if isinstance(s, ast.FunctionDef) and s.name.startswith("test")]
    return _parsed("\n".join(f"{name}({m!r}).debug()" if cases else f"{name}().{m}()" for m in methods))


def _fence_asserts(function: ast.FunctionDef, count: int) -> int:
    """Each assert at the top of `check` is a test; a check with none is one test as a whole."""
    inside: list[ast.stmt] = []
    first = count
    for statement in function.body:
        if isinstance(statement, ast.Assert):
            inside.append(_fenced(count, [statement]))
            count += 1
        else:
            inside.append(statement)
    function.body = inside if count > first else [_fenced(count, function.body)]
    return count if count > first else count + 1


def _fenced(number: int, statements: list[ast.stmt]) -> ast.stmt:
    case = ast.Call(func=ast.Name(id=CASE, ctx=ast.Load()), args=[ast.Constant(value=number)], keywords=[])
    return ast.With(items=[ast.withitem(context_expr=case)], body=statements)


def _source(body: list[ast.stmt]) -> str:
    return ast.unparse(ast.fix_missing_locations(ast.Module(body=body, type_ignores=[])))
