"""Where there is a compiler the CPU kernels are built: tests that compare them must not pass by finding none."""

from twofold.kernels import native
from twofold.platforms import find_compiler


def test_a_compiler_means_kernels() -> None:
    if find_compiler() is not None and native.best() != "none":
        assert native.missing() == ""
