"""What every test needs: threads that do not spin, set before anything imports torch, and numbers that repeat."""

from __future__ import annotations

from twofold.platforms.threads import bound_spin

bound_spin()

import contextlib  # noqa: E402
import os  # noqa: E402

import pytest  # noqa: E402
import torch  # noqa: E402

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # Triton asks when it is imported, by whoever does so first


with contextlib.suppress(ImportError):  # the machine of the GPU tests may lack it
    from hypothesis import settings

    settings.register_profile("twofold", deadline=None)  # a crowded machine is no counterexample
    settings.load_profile("twofold")


@pytest.fixture(autouse=True)
def _repeatable() -> None:
    torch.manual_seed(0)
