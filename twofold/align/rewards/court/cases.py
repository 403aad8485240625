"""What counts as one test, and the tests as a module in which each of them is fenced off from the others.

    ["assert f(1) == 2", ...]       each snippet
    "assert f(1) == 2\n..."         each assert at the top; what stands between is set-up
    "def test_x(): ..."             each such function, called
    "class TestX(TestCase): ..."    each such method, of unittest's classes and of plain ones
    "def check(candidate): ..."     HumanEval's: each assert at its top, `candidate` being the entry point

A fenced statement stands in `with __case__(number):`, which swallows what it raises and notes whether it passed.
"""

from __future__ import annotations

import ast
from collections.abc import Sequence

CASE = "__case__"


def arrange(tests: str | Sequence[str], entry: str | None) -> tuple[str, int]:
    """The source of the module and the number of tests in it.

    Raises ValueError where the tests are not Python, or where there is nothing in them that could fail.
    """
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
