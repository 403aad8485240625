"""One tiny checkpoint and one server for the end-to-end tests that leave it as they found it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import Browser, chromium
from served import Served, served
from tiny_checkpoint import make_checkpoint


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny")


@pytest.fixture(scope="module")
def window(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with chromium(tmp_path_factory.mktemp("chromium")) as browser:
        yield browser()


@pytest.fixture(scope="session")
def shared_server(tiny: Path) -> Iterator[Served]:
    limits = {
        "header_seconds": 1.0,
        "body_seconds": 1.0,
        "body_bytes": 200_000,
        "write_seconds": 1.0,
        "connections": 260,
    }
    with served(tiny, limits=limits) as server:
        yield server


@pytest.fixture
def server(shared_server: Served) -> Iterator[Served]:
    """The shared server, idle before the test and after it."""
    shared_server.wait(shared_server.idle)
    yield shared_server
    shared_server.wait(shared_server.idle)
