"""What every test needs: threads that do not spin, set before anything imports torch, and numbers that repeat."""

from __future__ import annotations

from twofold.platforms.threads import bound_spin

bound_spin()

import os  # noqa: E402

import pytest  # noqa: E402
import torch  # noqa: E402

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # Triton asks when it is imported, by whoever does so first


@pytest.fixture(autouse=True)
def _repeatable() -> None:
    torch.manual_seed(0)
