"""The front stays light: no torch, and the settings cost next to nothing."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("twofold.serve.server", ["torch", "transformers"]),
        ("twofold.serve.worker", ["torch", "uvicorn", "starlette"]),
        ("twofold.serve.config", ["torch", "msgspec", "uvicorn", "tokenizers"]),
    ],
)
def test_what_a_module_does_not_import(module: str, absent: list[str]) -> None:
    program = f"import sys, {module}; print([name for name in {absent!r} if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
