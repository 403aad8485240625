"""The built-in rewards, each against values worked by hand."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import pytest

from twofold.align.rewards import RewardConfig, builtin
from twofold.align.rewards.builtin import compiles
from twofold.align.rewards.extract import code_of, fenced, text_of
from twofold.align.rewards.scorers import build_scorer
from twofold.align.rewards.wire import Batch, Scored, checked
from twofold.data.schema import check_schema, valid


def judge(config: RewardConfig, *completions: Any, prompt: Any = "", tokens: int = 0, **columns: list[Any]) -> Scored:
    count = len(completions)
    return build_scorer(config)(Batch([prompt] * count, list(completions), [[0] * tokens] * count, columns, 0))


def test_regex_is_found_anywhere_or_covers_all() -> None:
    assert judge(RewardConfig(kind="regex", pattern=r"\d+"), "a 12", "a", "").values == [1.0, 0.0, 0.0]
    assert judge(RewardConfig(kind="regex", pattern=r"\d+", whole=True), "a 12", "12").values == [0.0, 1.0]


def test_a_busy_machine_costs_no_completion(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a large batch each has a few milliseconds; not to be let run for longer than that is nobody's fault."""

    def waits(config: RewardConfig) -> Callable[[Any], float]:
        return lambda row: time.sleep(0.05) or 1.0

    monkeypatch.setitem(builtin._KINDS, "length", waits)
    scored = judge(RewardConfig(kind="length", most=9, timeout=0.5), *["a"] * 12)
    assert scored.values == [1.0] * 12 and not scored.faults


def test_a_regex_that_never_ends_costs_that_completion_alone() -> None:
    scored = judge(RewardConfig(kind="regex", pattern=r"(a+)+$", seconds=0.2), "a", "a" * 60 + "b", "b")
    assert scored.values == [1.0, 0.0, 0.0]
    assert [(fault.reason, fault.count) for fault in scored.faults] == [("timeout", 1)]


def test_length_falls_in_a_line() -> None:
    config = RewardConfig(kind="length", least=4, most=6, slack=4, unit="characters")
    assert judge(config, "", "aa", "aaaa", "aaaaaa", "a" * 8, "a" * 99).values == [0.0, 0.5, 1.0, 1.0, 0.5, 0.0]
    assert judge(RewardConfig(kind="length", most=2, unit="words"), "a b", "a b c").values == [1.0, 0.0]
    assert judge(RewardConfig(kind="length", least=3), "x", tokens=3).values == [1.0]
    assert judge(RewardConfig(kind="length", least=3), "x", tokens=2).values == [0.0]


def test_equals_compares_as_it_is_told() -> None:
    answers: dict[str, list[Any]] = {"answer": ["Paris", "Paris", None]}
    assert judge(RewardConfig(kind="equals"), " paris \n", "London", "x", **answers).values == [1.0, 0.0, None]
    exact = RewardConfig(kind="equals", compare="exact")
    assert judge(exact, "paris", "Paris", "x", **answers).values == [0.0, 1.0, None]
    number = RewardConfig(kind="equals", compare="number", answer="gold")
    said = ("so it is 1,000.", "12 then 1000.0", "none", "-1000")
    assert judge(number, *said, gold=["1000", 1000, 1, "1000"]).values == [1.0, 1.0, 0.0, 0.0]


def test_equals_takes_the_last_answer_that_its_pattern_finds() -> None:
    config = RewardConfig(kind="equals", pattern=r"<answer>(.*?)</answer>")
    said = ("<answer>3</answer> no, <answer>4</answer>", "4", "<answer>4</answer> <answer>5</answer>")
    assert judge(config, *said, answer=["4", "4", "4"]).values == [1.0, 0.0, 0.0]


def test_json_schema_reads_a_whole_completion_or_a_block() -> None:
    schema = {"type": "object", "required": ["a"], "properties": {"a": {"type": "integer"}}}
    config = RewardConfig(kind="json_schema", schema=schema)
    said = ('{"a": 1}', 'Here:\n```json\n{"a": 2}\n```\n', '{"a": "1"}', "{}", "not JSON", '{"a": NaN}', "[" * 99999)
    assert judge(config, *said, '{"a": 1e999}').values == [1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("schema", "right", "wrong"),
    [
        ({"type": ["integer", "null"]}, [1, 1.0, None], [1.5, "1", True]),
        ({"enum": [1, "a", {"b": [1]}]}, [1, 1.0, {"b": [1.0]}], [True, {"b": [True]}, []]),
        ({"const": False}, [False], [0, None]),
        ({"properties": {"a": {"type": "string"}}, "additionalProperties": False}, [{}, {"a": ""}, 3], [{"b": 1}]),
        ({"patternProperties": {"^n": {"type": "number"}}, "additionalProperties": False}, [{"n1": 1}], [{"n": ""}]),
        ({"propertyNames": {"maxLength": 2}, "minProperties": 1}, [{"ab": 0}], [{"abc": 0}, {}]),
        ({"prefixItems": [{"type": "string"}], "items": {"type": "number"}}, [["a", 1]], [["a", "b"], [1]]),
        ({"contains": {"const": 1}, "uniqueItems": True, "maxItems": 2}, [[1, True]], [[2], [1, 1.0], [1, 2, 3]]),
        ({"minLength": 2, "pattern": "^a"}, ["ab", 1], ["a", "ba"]),
        ({"minimum": 1, "exclusiveMaximum": 3, "multipleOf": 0.5}, [1, 2.5, "x"], [0, 3, 1.2]),
        ({"anyOf": [{"type": "string"}, {"minimum": 5}], "not": {"const": 7}}, ["a", 6], [1, 7]),
        ({"oneOf": [{"type": "number"}, {"minimum": 5}]}, [1], [6]),
        ({"allOf": [{"type": "number"}, {"maximum": 5}]}, [5], [6, "a"]),
        ({"if": {"type": "string"}, "then": {"maxLength": 1}, "else": {"minimum": 0}}, ["a", 1], ["ab", -1]),
        ({"$defs": {"n": {"items": {"$ref": "#/$defs/n"}, "maxItems": 1}}, "$ref": "#/$defs/n"}, [[[]]], [[[1, 2]]]),
    ],
)
def test_schema_keywords(schema: dict[str, Any], right: list[Any], wrong: list[Any]) -> None:
    check_schema(schema)
    assert [valid(json.loads(json.dumps(value)), schema) for value in right] == [True] * len(right)
    assert [valid(json.loads(json.dumps(value)), schema) for value in wrong] == [False] * len(wrong)


@pytest.mark.parametrize(
    ("schema", "said"),
    [
        ({"type": "strng"}, "did you mean 'string'"),
        ({"properties": {"a": {"minimun": 1}}}, "schema.properties.a.*did you mean 'minimum'"),
        ({"pattern": "("}, "no regular expression"),
        ({"$ref": "#/$defs/missing"}, "not there"),
        ({"$ref": "https://example.org/schema"}, "only point into the schema"),
        ({"required": "a"}, "cannot be 'a'"),
        ({"anyOf": [1]}, r"anyOf\[0\]' must be a table"),
    ],
)
def test_a_schema_that_means_nothing_is_refused(schema: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        check_schema(schema)


def test_python_parses_compiles_and_does_not_run() -> None:
    fence = "Sure:\n```python\nx = 1\n```\nDone."
    said = (fence, "x = ", "return 1", "", "raise SystemExit", "```\nx = 1\n```", "prose, and more")
    assert judge(RewardConfig(kind="python_parses"), *said).values == [1.0, 0.0, 0.0, 0.0, 1.0, 1.0, 0.0]
    config = RewardConfig(kind="python_parses", prefix=True)
    assert judge(config, "    return 1\n", "return 1", prompt="def f():\n").values == [1.0, 0.0]


@pytest.mark.parametrize("code", ["-" * 100_000 + "1", "(" * 50_000, "a." * 200_000 + "b", "\x00", "9" * 500_000])
def test_python_that_would_break_a_parser_only_fails(code: str) -> None:
    assert not compiles(code)


def test_code_is_the_last_python_block() -> None:
    text = "```python\na\n```\n```sh\nls\n```\n```py\nb\n```\nend"
    assert fenced(text, "python", "py") == "b\n"
    assert code_of("p", "no block", prefix=False) == "no block"
    assert code_of("p", "```python\nunclosed", prefix=False) == "unclosed"
    assert text_of([{"role": "user", "content": "q"}, {"role": "assistant", "content": [{"text": "a"}]}]) == "a"


def test_what_a_reward_returns_is_checked_value_by_value() -> None:
    import torch

    assert checked([True, 2, None, 0.5], 4).values == [1.0, 2.0, None, 0.5]
    assert checked(torch.tensor([1.0, 2.0]), 2).values == [1.0, 2.0]
    assert checked([torch.tensor(3.0)], 1).values == [3.0]
    scored = checked([1.0, float("nan"), float("inf"), "1"], 4)
    assert scored.values == [1.0, None, None, None]
    assert {fault.reason: fault.count for fault in scored.faults} == {"not finite": 2, "type": 1}
    assert [(f.reason, f.count) for f in checked([1.0], 2).faults] == [("count", 2)]
    assert [(f.reason, f.count) for f in checked("ab", 2).faults] == [("type", 2)]
