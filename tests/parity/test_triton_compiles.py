"""The Triton kernels through Triton's compiler down to the device's own binary, which needs no device."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")

HERE = Path(__file__).parent
ROOM = HERE.parents[1] / "twofold" / "kernels" / "triton"
HOPPER, SHARED = 90, 227 * 1024


def written() -> set[str]:
    """The kernels that are launched: jit functions whose launch `name[grid](` stands in the room."""
    text = "\n".join(path.read_text(encoding="utf-8") for path in ROOM.glob("*.py"))
    return {name for name in re.findall(r"@triton\.jit\ndef (\w+)", text) if f"{name}[" in text}


def test_every_kernel_compiles_for_hopper(tmp_path):
    root = HERE.parents[1]
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "TRITON_INTERPRET": "0", "PYTHONPATH": str(root)}
    command = [sys.executable, str(HERE / "triton_compiler.py"), str(HOPPER)]
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert {each["kernel"] for each in found} == written()
    assert all(each["binary"] > 1000 and each["shared"] <= SHARED for each in found)
    products = [each for each in found if each["kernel"] in ("_product", "_walk")]
    units = {unit for each in products for unit in each["products"]}
    assert units == {"mma", "wgmma"}, "products run on the tensor cores, few rows on the narrow instruction"
    assert max(each["widest_copy"] for each in products) == 10, "copies of 16 bytes, ahead of the products"
