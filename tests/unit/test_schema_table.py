"""What JSON Schema means to the grammar: what a schema forbids cannot be written, what no grammar holds is said."""

from __future__ import annotations

import json
import re

import jsonschema
import pytest

from tests.unit.schema_table import Case, Reader, cases, spellings, table, written
from twofold.core import RequestError
from twofold.data.schema import schema_error

CASES = cases()
SAID = ("no grammar holds", "pattern", "format", "$ref", "Pointer", "Resource", "no text fits", "control character")


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Reader:
    return Reader(tmp_path_factory.mktemp("tokenizer"))


def test_the_table_is_large_and_says_what_json_schema_says() -> None:
    assert len(CASES) >= 150 and sum(len(case.invalid) for case in CASES) >= 400
    for case in CASES:
        text = json.dumps(case.schema)
        if any(word in text for word in ("example.com", "#/$defs/none", "\\\\p{L}", '"format"')):
            continue  # not there, not Python's, not asserted by this validator
        validator = jsonschema.Draft202012Validator(case.schema)
        assert all(validator.is_valid(value) for value in case.valid), case
        assert not any(validator.is_valid(value) for value in case.invalid), case


def test_nothing_forbidden_can_be_written(reader: Reader) -> None:
    assert [(case.schema, verdict.taken) for case, verdict in zip(CASES, reader.verdicts()) if verdict.taken] == []


def test_what_is_enforced_can_be_written(reader: Reader) -> None:
    """Valid instances whose properties stand in another order than the grammar's are the only ones lost."""
    lost = [(case.keyword, verdict.lost) for case, verdict in zip(CASES, reader.verdicts()) if verdict.lost]
    assert len(lost) <= 2 and {keyword for keyword, _ in lost} <= {"allOf", "anyOf"}, lost


def test_a_refusal_names_what_is_refused(reader: Reader) -> None:
    refused = {case.keyword: found.refusal for case, found in zip(CASES, reader.verdicts()) if found.refusal}
    for keyword, why in refused.items():
        assert any(word in why for word in SAID), why
        words = [word for word in keyword.split(" and ") if re.match(r"^\$?[a-zA-Z]+$", word)]
        if keyword not in ("empty set", "const", "$ref", "allOf"):
            assert any(word in why for word in words), (keyword, why)
    assert {"not", "if", "contains", "uniqueItems", "propertyNames", "unevaluatedItems"} <= set(refused)


def test_the_page_lists_what_is_refused(reader: Reader) -> None:
    assert written() == table(reader), "run: python -m tests.unit.schema_table"


def test_another_spelling_of_a_known_property_is_no_unknown_property(reader: Reader) -> None:
    """`\\u0066oo` is foo: as a property that the schema does not name it would escape the schema of foo."""
    form = Case("", {"type": "object", "properties": {"foo": {"type": "integer"}}}, [], []).form()
    assert reader.takes(form, '{"foo":1}') and reader.takes(form, '{"bar":"x"}')
    assert not reader.takes(form, '{"foo":"x"}') and not reader.takes(form, r'{"\u0066oo":"x"}')


def test_a_property_twice_is_not_two(reader: Reader) -> None:
    two = Case("", {"type": "object", "minProperties": 2}, [], []).form()
    assert "minProperties" in str(reader.refusal(two))
    sure = Case("", {"type": "object", "properties": {"a": {}, "b": {}}, "required": ["a", "b"], "minProperties": 2,
                     "additionalProperties": False}, [], []).form()  # fmt: skip
    assert reader.takes(sure, '{"a":1,"b":1}') and not reader.takes(sure, '{"a":1,"a":1}')


def test_without_strict_the_rest_is_enforced_and_the_whole_is_checked(reader: Reader) -> None:
    lenient = 0
    for case, verdict in zip(CASES, reader.verdicts()):
        form = case.form(strict=False)
        if verdict.refusal is None or reader.refusal(form) is not None:
            continue
        try:
            verdicts = [schema_error(json.dumps(value), str(form.json)) for value in case.invalid]
        except RequestError as error:
            assert "unknown keyword" in str(error)  # not even this validator knows it
            continue
        lenient += 1
        assert all(verdicts), case
        for value in case.valid:
            assert schema_error(json.dumps(value), str(form.json)) is None
            assert any(reader.takes(form, text) for text in spellings(value)), case
    assert lenient >= 18


@pytest.mark.parametrize(
    ("text", "schema", "words"),
    [
        ("{", {}, "not JSON"),
        ('{"a": [1, "x"]}', {"properties": {"a": {"items": {"type": "integer"}}}}, "answer.a[1]: breaks 'type'"),
        ('{"a": 1}', {"not": {"required": ["a"]}}, "answer: breaks 'not'"),
        ("1e400", {"type": "integer"}, "breaks 'type'"),
        ("[" * 100_000, {}, "not JSON"),
    ],
)
def test_what_is_wrong_with_a_text_is_told_by_place(text: str, schema: dict[str, object], words: str) -> None:
    assert words in str(schema_error(text, json.dumps(schema)))
