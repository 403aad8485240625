"""The Grafana dashboard asks for nothing that the server does not tell, and is a file that Grafana takes."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from served import ROOT, served

DASHBOARD = json.loads((ROOT / "docs" / "grafana.json").read_text(encoding="utf-8"))
PANELS = DASHBOARD["panels"]
METRIC = re.compile(r"\b((?:vllm|twofold):\w+)")
PLACES = (
    "throughput",
    "first token",
    "between",
    "end to end",
    "waiting",
    "cache",
    "preemptions",
    "guessed",
    "adapters",
)


def expressions(node: Any) -> list[str]:
    """Every query of the file, those of variables and annotations too."""
    if isinstance(node, dict):
        here = [value for key, value in node.items() if key in ("expr", "definition") and isinstance(value, str)]
        return here + [found for value in node.values() for found in expressions(value)]
    return [found for value in node for found in expressions(value)] if isinstance(node, list) else []


def test_panels_have_ids_of_their_own_and_do_not_overlap() -> None:
    ids = [panel["id"] for panel in PANELS]
    assert len(ids) == len(set(ids)) > 20
    cells = [
        (x, y)
        for place in (panel["gridPos"] for panel in PANELS)
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(cells) == len(set(cells)) and max(x for x, _ in cells) < 24


def test_every_query_goes_to_the_chosen_data_source() -> None:
    (source,) = [one for one in DASHBOARD["templating"]["list"] if one["type"] == "datasource"]
    assert (source["name"], source["query"]) == ("datasource", "prometheus")
    asked = [target for panel in PANELS for target in panel.get("targets", [])]
    assert all(target["datasource"]["uid"] == "${datasource}" for target in asked) and len(asked) > 30
    for panel in PANELS:
        names = [target["refId"] for target in panel.get("targets", [])]
        assert len(names) == len(set(names)) and (names or panel["type"] == "row")
    titles = " ".join(panel["title"] for panel in PANELS).lower()
    assert not [place for place in PLACES if place not in titles]


@pytest.mark.parametrize("expression", expressions(DASHBOARD))
def test_brackets_close(expression: str) -> None:
    bare = re.sub(r'"[^"]*"', "", expression)
    open_: list[str] = []
    for sign in bare:
        if sign in "([{":
            open_.append(sign)
        elif sign in ")]}":
            assert open_ and open_.pop() + sign in ("()", "[]", "{}"), expression
    assert not open_


def test_every_metric_that_is_asked_for_is_told(tiny: Path) -> None:
    asked = {name for expression in expressions(DASHBOARD) for name in METRIC.findall(expression)}
    assert len(asked) > 25
    engine = {"enable_lora": True, "speculative": {"method": "ngram", "num_speculative_tokens": 3}}
    with served(tiny, engine=engine) as server:
        body = {"prompt": "one two one two one two", "max_tokens": 24, "n": 2}
        assert server.http.post("/v1/completions", json=body).status_code == 200
        text = server.http.get("/metrics").text
    told = set(re.findall(r"^([a-z]\w*:\w+)(?:{| )", text, re.M))
    assert asked <= told, asked - told
    labels = set(re.findall(r"by \((\w+)\)", " ".join(expressions(DASHBOARD))))
    assert labels <= set(re.findall(r'[{,](\w+)="', text))
