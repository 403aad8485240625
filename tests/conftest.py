"""What every test needs: threads that do not spin, set before anything imports torch, and numbers that repeat."""

from __future__ import annotations

from twofold.platforms.threads import bound_spin

bound_spin()

import pytest  # noqa: E402
import torch  # noqa: E402


@pytest.fixture(autouse=True)
def _repeatable() -> None:
    torch.manual_seed(0)
