"""What counts as one test, and the tests as a module in which each of them is fenced off from the others.

    ["assert f(1) == 2", ...]       each snippet
    "assert f(1) == 2\n..."         each assert at the top; what stands between is set-up
    "def test_x(): ..."             each such function, called
    "def check(candidate): ..."     HumanEval's: each assert at its top, `candidate` being the entry point

A fenced statement stands in `with __case__(number):`, which swallows what it raises and notes whether it passed.
"""

from __future__ import annotations

import ast
from collections.abc import Sequence

CASE = "__case__"


def arrange(tests: str | Sequence[str], entry: str | None) -> tuple[str, int]:
    """The source of the module and the number of tests in it. Raises ValueError where the tests are not Python."""
    if isinstance(tests, str):
        return _script(_parsed(tests), entry)
    body: list[ast.stmt] = []
    for number, snippet in enumerate(tests):
        body.append(_fenced(number, _parsed(snippet)))
    return _source(body), len(tests)


def _parsed(text: str) -> list[ast.stmt]:
    try:
        return ast.parse(text).body or [ast.Pass()]
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
        raise ValueError(f"was given tests that are not Python: {error}") from None


def _script(statements: list[ast.stmt], entry: str | None) -> tuple[str, int]:
    body: list[ast.stmt] = []
    called = any(isinstance(s, ast.Expr) and _names(s.value) == "check" for s in statements)
    count = 0
    for statement in statements:
        if isinstance(statement, ast.Assert):
            body.append(_fenced(count, [statement]))
            count += 1
            continue
        body.append(statement)
        if not isinstance(statement, ast.FunctionDef):
            continue
        if statement.name.startswith("test"):
            body.append(_fenced(count, [_call(statement.name, None)]))
            count += 1
        elif statement.name == "check" and (entry or called):
            count = _fence_asserts(statement, count)
            if not called:
                body.append(_fenced(-1, [_call("check", entry)]))
    if count == 0:
        return _source([_fenced(0, body or [ast.Pass()])]), 1
    return _source(body), count


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


def _call(name: str, argument: str | None) -> ast.stmt:
    args: list[ast.expr] = [ast.Name(id=argument, ctx=ast.Load())] if argument else []
    return ast.Expr(value=ast.Call(func=ast.Name(id=name, ctx=ast.Load()), args=args, keywords=[]))


def _names(value: ast.expr) -> str | None:
    return value.func.id if isinstance(value, ast.Call) and isinstance(value.func, ast.Name) else None


def _source(body: list[ast.stmt]) -> str:
    return ast.unparse(ast.fix_missing_locations(ast.Module(body=body, type_ignores=[])))
