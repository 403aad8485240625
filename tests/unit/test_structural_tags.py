"""Structural tags: what each of their parts takes, and what not; arguments in Python; odd vocabularies."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import pytest

from tests.unit.schema_table import Reader
from tests.unit.toy_tokenizers import metaspace, save, sentencepiece_like
from twofold.engine.grammar.matchers import Matchers, Stand
from twofold.engine.grammar.pythonic import python_arguments
from twofold.engine.grammar.vocabulary import Vocabulary
from twofold.engine.structured import StructuredOutputs


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Reader:
    return Reader(tmp_path_factory.mktemp("tokenizer"))


def tagged(format: dict[str, Any]) -> StructuredOutputs:
    return StructuredOutputs(structural_tag={"type": "structural_tag", "format": format})


WEATHER = {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
           "required": ["city"], "additionalProperties": False}  # fmt: skip
TAGS = [
    {"type": "tag", "begin": f"<call>{name}(", "content": {"type": "json_schema", "json_schema": schema}, "end": ")"}
    for name, schema in (("weather", WEATHER), ("now", {"type": "object", "properties": {}}))
]
SUNNY, NOW = '<call>weather({"city": "Köln", "days": 3})', "<call>now({})"
LIST: dict[str, Any] = {"type": "tags_with_separator", "tags": TAGS, "separator": ", "}
FREE: dict[str, Any] = {"type": "triggered_tags", "tags": TAGS, "triggers": ["<call>"]}


@pytest.mark.parametrize(
    ("format", "good", "bad"),
    [
        (LIST | {"at_least_one": True}, [SUNNY, NOW, f"{SUNNY}, {NOW}"],
         ["", "hello", f"hi {NOW}", "<call>weather({})", "<call>nobody({})", f"{NOW} ", f"{NOW}{NOW}"]),
        (LIST, ["", NOW, f"{NOW}, {NOW}"], ["hello", f"{NOW}, "]),
        (LIST | {"stop_after_first": True}, ["", SUNNY], [f"{SUNNY}, {NOW}"]),
        (FREE, ["", "hello", SUNNY, f"hi {NOW}", f"{SUNNY}{NOW}", f"a {NOW} b {SUNNY} c"],
         [f"{NOW} and <call>", "<call>nobody({})", "<call>", '<call>weather({"town": "x"})']),
        (FREE | {"at_least_one": True}, [NOW, f"{NOW} so"], ["", "hello", f"hi {NOW}"]),
        (FREE | {"stop_after_first": True}, ["", "hello", NOW, f"well {NOW}"], [f"{NOW}{NOW}"]),
    ],
)  # fmt: skip
def test_tags(reader: Reader, format: dict[str, Any], good: list[str], bad: list[str]) -> None:
    made = tagged(format)
    assert [text for text in good if not reader.takes(made, text)] == []
    assert [text for text in bad if reader.takes(made, text)] == []


def test_special_tokens_are_tokens_and_not_their_characters(reader: Reader) -> None:
    special = reader.tokenizer.special_tokens
    tag = {"type": "tag", "begin": "<|im_start|>", "content": {"type": "const_string", "value": "x"},
           "end": "<|im_end|>"}  # fmt: skip
    triggered = {"type": "triggered_tags", "triggers": ["<|im_start|>"], "tags": [tag]}
    for part in (tag, triggered):
        matcher = reader.matchers.matcher(tagged(part))
        assert matcher.consume_tokens([special["<|im_start|>"], *reader.tokenizer.encode("x"), special["<|im_end|>"]])
        assert matcher.is_accepting()
    spelled = reader.tokenizer.encode("<|im_start|>")
    assert len(spelled) > 1 and not reader.matchers.matcher(tagged(tag)).consume_tokens(spelled)


PYTHON: dict[str, Any] = {
    "type": "object",
    "properties": {"a": {"type": "string"}, "b": {"type": "boolean"}, "c": {"enum": [None, "x", 1]},
                   "d": {"type": "array", "items": {"type": ["integer", "null"]}}, "e": {"type": "object"}, "g": {}},
    "required": ["b"]}  # fmt: skip


@pytest.mark.parametrize("text", [
    "b=True", 'a="x\\n", b=False, c=None', "b=True, d=[1, None, 2]",
    'b=True, c="x", e={"k": [True, {"n": None}]}, g=[1.5]',
])  # fmt: skip
def test_arguments_in_python_are_python(reader: Reader, text: str) -> None:
    assert reader.takes(StructuredOutputs(grammar=python_arguments(PYTHON)), text)
    assert isinstance(ast.parse(f"f({text})", mode="eval").body, ast.Call)


@pytest.mark.parametrize("text", [
    "", "b=true", "b=1", 'b=True, a="x"', "b=True, z=1", "b=True,", 'b=True, c="y"', "b=True, d=[1.5]",
])  # fmt: skip
def test_arguments_in_python_that_are_none(reader: Reader, text: str) -> None:
    assert not reader.takes(StructuredOutputs(grammar=python_arguments(PYTHON)), text)


def test_the_older_notation_of_structural_tags(reader: Reader) -> None:
    tag = {"type": "structural_tag", "triggers": ["<f"], "structures": [
        {"begin": "<f=a>", "schema": {"type": "integer"}, "end": "</f>"},
        {"begin": "<f=b>", "schema": {"enum": ["x"]}, "end": "</f>"}]}  # fmt: skip
    made = StructuredOutputs(structural_tag=tag)
    for text in ("", "free", 'free <f=a>12</f> and <f=b>"x"</f>.', "<f=a>1</f><f=a>2</f>"):
        assert reader.takes(made, text), text
    for text in ("<f=c>", "<f=a>x</f>", "<f=b>12</f>", "<f=a>12"):
        assert not reader.takes(made, text), text


def test_any_text_in_a_tag_ends_at_its_end(reader: Reader) -> None:
    parts = [{"type": "tag", "begin": "<a>", "content": {"type": "any_text"}, "end": "</a>"},
             {"type": "regex", "pattern": "[0-9]/[0-9]"}, {"type": "grammar", "grammar": 'root ::= "x"+'}]  # fmt: skip
    made = tagged({"type": "sequence", "elements": parts})
    assert reader.takes(made, "<a>any <b> thing</a>1/2xx") and not reader.takes(made, "<a>no end1/2x")


def test_a_model_folder_without_end_token_and_one_of_unigrams(tmp_path: Path) -> None:
    """The stand-in for an end token is never allowed; a vocabulary that llguidance cannot read is spelled out to it."""
    for number, made in enumerate((sentencepiece_like(), metaspace())):
        folder = tmp_path / str(number)
        tokenizer = save(made, folder)
        vocabulary = Vocabulary(folder, tokenizer.vocab_size + 37, ())
        matchers = Matchers(vocabulary)
        stand, said = Stand(matchers, StructuredOutputs(regex="(a|b)x[ab]{2}"), ()), b""
        while (state := stand.next())[0] or state[1]:
            forced, mask = state
            choices = [t for t in range(8 * len(mask)) if mask[t >> 3] >> (t & 7) & 1] if not forced else []
            token = forced[0] if forced else choices[-1]
            assert token < tokenizer.vocab_size
            said += tokenizer.token_bytes(token)
            stand.advance([token])
        assert json.loads(json.dumps(said.decode()))[1] == "x" and len(said) == 4
        open_end = Stand(matchers, StructuredOutputs(regex="a*"), ())
        assert not any(open_end.next()[1][t >> 3] >> (t & 7) & 1 for t in (*tokenizer.special_ids, vocabulary.never[0]))
