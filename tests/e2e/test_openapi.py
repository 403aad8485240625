"""The server is what its OpenAPI document says: schemathesis asks what the document allows and what it forbids.

A few requests for each route here; `make fuzz` asks thousands ($EXAMPLES for each route, in each way).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase
from malformed import malformed
from schemathesis.checks import CHECKS
from schemathesis.generation import GenerationMode
from schemathesis.schemas import APIOperation
from served import ROOT, Served, served

from twofold.serve.described import ROWS

EXAMPLES = int(os.environ.get("EXAMPLES", "4"))
ENGINE = [sys.executable, str(ROOT / "tests" / "unit" / "fake_engine.py")]
# Numbers' bounds are not in the document, so what it allows may be refused; and what it forbids may be read as it was
# meant (a field sent twice in a query, a number as text), so neither is a mistake.
LOOSE = {"positive_data_acceptance", "negative_data_rejection", "unsupported_method", "missing_required_header"}
CHECKED = [CHECKS.get_one(name) for name in CHECKS.get_all_names() if name not in LOOSE]
ASKED = [(*route, GenerationMode.POSITIVE) for route in ROWS] + [
    (*route, GenerationMode.NEGATIVE) for route, row in ROWS.items() if row.body or row.query or row.form
]
POSTED = sorted(path for (method, path), row in ROWS.items() if row.body is not None)


@pytest.fixture(scope="module")
def fast(tiny: Path) -> Iterator[Served]:
    """The whole server in front of an engine that is a hash."""
    with served(tiny, command=ENGINE, limits={"body_seconds": 5.0}) as server:
        yield server
        assert server.stats()["engine_restarts_total"] == 0
        assert not [line for line in server.log if "Traceback" in line], "".join(server.log)


@pytest.fixture(scope="module")
def operations(fast: Served) -> dict[tuple[str, str], APIOperation]:
    schema = schemathesis.openapi.from_dict(fast.http.get("/openapi.json").json())
    found = [result.ok() for result in schema.get_all_operations()]
    return {(operation.method.upper(), operation.path): operation for operation in found}


def test_every_route_is_described(operations: dict[tuple[str, str], Any]) -> None:
    assert set(operations) == set(ROWS)


def test_the_page_lists_every_route() -> None:
    page = (ROOT / "docs" / "serve.md").read_text(encoding="utf-8")
    missing = [(method, path) for method, path in ROWS if f"| {method} `{path}` |" not in page]
    assert not missing, "add a row to the table in docs/serve.md"


@pytest.mark.parametrize(("method", "path", "mode"), ASKED, ids=lambda value: str(getattr(value, "value", value)))
def test_answers_are_documented(
    fast: Served, operations: dict[tuple[str, str], APIOperation], method: str, path: str, mode: GenerationMode
) -> None:
    operation = operations[method, path]
    with requests.Session() as session:
        session.trust_env = False
        _ask(operation, mode, partial(_one, fast, session))


def _ask(operation: APIOperation, mode: GenerationMode, one: Any) -> None:
    @hypothesis.settings(
        max_examples=EXAMPLES,
        database=None,
        derandomize=EXAMPLES < 20,
        phases=(Phase.generate,),
        suppress_health_check=list(HealthCheck),
    )
    @hypothesis.given(case=operation.as_strategy(generation_mode=mode))
    def asked(case: Any) -> None:
        one(case)

    asked()


def _one(server: Served, session: requests.Session, case: Any) -> None:
    answer = case.call(base_url=server.url, session=session, timeout=20)
    case.validate_response(answer, checks=CHECKED)


@pytest.mark.parametrize("path", POSTED)
def test_a_hundred_malformed_bodies_each_are_refused(fast: Served, path: str) -> None:
    row = ROWS["POST", path]
    assert row.body is not None
    bodies = malformed(row.body)
    assert len(bodies) >= 100
    for kind, body in bodies:
        answer = fast.http.post(path, content=body, headers={"content-type": "application/json"})
        assert 400 <= answer.status_code < 500, (kind, body[:200], answer.status_code)
        assert answer.json()["error"]["message"]
