"""From the command to the first token: what is not imported on the way takes no time."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = (
    "sympy",
    "torch.fx.experimental.symbolic_shapes",
    "torch._dynamo",
    "torch._inductor",
    "torch.onnx",
    "transformers",
    "safetensors",
    "jinja2",
    "rich",
)
PROGRAM = """
import sys
from twofold.cli import main

model, heavy, *flags = sys.argv[1:]
code = main(["generate", "--model", model, "--prompt", "def", "--max-tokens", "1", *flags])
print([name for name in heavy.split() if name in sys.modules], code)
"""


@pytest.mark.parametrize("flags", [(), ("--dtype", "bfloat16"), ("--quantization", "int8")], ids=" ".join)
def test_a_first_token_needs_no_heavy_module(tiny: Path, flags: tuple[str, ...]) -> None:
    command = [sys.executable, "-c", PROGRAM, str(tiny), " ".join(HEAVY), *flags]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1:] == ["[] 0"], done.stdout + done.stderr
