"""What the package never does: run what it reads, reach for a shell, listen to the world unasked, import a peer."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from repository import ROOT, files, name, python_files, tree

MODULES = {
    "pickle",
    "cPickle",
    "_pickle",
    "dill",
    "cloudpickle",
    "marshal",
    "shelve",
    "joblib",
    "yaml",
    "transformers",
    "trl",
}
BUILTINS = {"eval", "exec", "compile", "__import__"}
ATTRIBUTES = {("torch", "load"), ("os", "system"), ("os", "popen"), ("numpy", "load"), ("np", "load")}
EVERYWHERE = "0.0.0.0"


def forbidden(module: ast.AST) -> Iterator[str]:
    """A line for each forbidden thing in a module."""
    for node in ast.walk(module):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] in MODULES:
                    yield f"line {node.lineno}: import {alias.name}"
        elif isinstance(node, ast.ImportFrom):
            if node.level == 0 and (node.module or "").split(".")[0] in MODULES:
                yield f"line {node.lineno}: from {node.module} import"
        elif isinstance(node, ast.Call):
            if isinstance(node.func, ast.Name) and node.func.id in BUILTINS:
                yield f"line {node.lineno}: {node.func.id}()"
            for keyword in node.keywords:
                value = keyword.value.value if isinstance(keyword.value, ast.Constant) else None
                if keyword.arg in ("shell", "trust_remote_code", "allow_pickle") and value is not False:
                    yield f"line {node.lineno}: {keyword.arg}="
                if keyword.arg in ("default", "host") and value == EVERYWHERE:
                    yield f"line {node.lineno}: {EVERYWHERE} as a default"
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if (node.value.id, node.attr) in ATTRIBUTES:
                yield f"line {node.lineno}: {node.value.id}.{node.attr}"
        elif isinstance(node, ast.arguments):
            for default in (*node.defaults, *node.kw_defaults):
                if isinstance(default, ast.Constant) and default.value == EVERYWHERE:
                    yield f"line {default.lineno}: {EVERYWHERE} as a default"
        elif isinstance(node, ast.AnnAssign | ast.Assign) and getattr(node.value, "value", None) == EVERYWHERE:
            yield f"line {node.lineno}: {EVERYWHERE} as a default"


@pytest.mark.parametrize("path", python_files("twofold"), ids=name)
def test_the_package_is_harmless(path: Path) -> None:
    assert not list(forbidden(tree(path)))


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from yaml import safe_load",
        "def f():\n    from transformers import AutoModel",
        "eval('1')",
        "exec('1')",
        "torch.load('x')",
        "load = torch.load",
        "subprocess.run('ls', shell=True)",
        "AutoModel.from_pretrained('x', trust_remote_code=True)",
        "host: str = '0.0.0.0'",
        "def serve(host='0.0.0.0'): ...",
        "uvicorn.run(app, host='0.0.0.0')",
    ],
)
def test_the_guard_sees_it(line: str) -> None:
    assert list(forbidden(ast.parse(line)))


@pytest.mark.parametrize("line", ["model.eval()", "re.compile('x')", "if host == '0.0.0.0': warn()", "json.load(f)"])
def test_the_guard_lets_the_harmless_pass(line: str) -> None:
    assert not list(forbidden(ast.parse(line)))


def test_no_path_of_somebodys_machine() -> None:
    """A path that exists on one machine alone has no place in the repository."""
    personal = re.compile(r"(?<![\w./])/(?:work|root|home/\w+|Users/\w+)/\S+")
    found = []
    for path in files():
        if path.suffix in (".py", ".md", ".toml", ".html", ".js", ".css", ".json", "") and path.stat().st_size < 2**20:
            text = path.read_text(encoding="utf-8", errors="replace")
            found += [f"{name(path)}: {match.group()}" for match in personal.finditer(text)]
    assert not found
    assert personal.search(f"see /{'home'}/somebody/models")


def test_requirements_never_name_a_host() -> None:
    """Packages come from the user's own index: nothing here points pip elsewhere."""
    for path in (ROOT / "Makefile", ROOT / "pyproject.toml", ROOT / ".ci" / "run"):
        assert not re.search(r"--(extra-)?index-url|--find-links|--trusted-host", path.read_text(encoding="utf-8"))
