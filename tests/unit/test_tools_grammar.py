"""Calls of tools as forms: what each way of wrapping them takes, and what not; structural tags beneath."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import pytest

from tests.unit.schema_table import Reader
from tests.unit.toy_tokenizers import metaspace, save, sentencepiece_like
from twofold.core import RequestError
from twofold.engine.grammar.matchers import Matchers, Stand
from twofold.engine.grammar.tools import tools_grammar
from twofold.engine.grammar.vocabulary import Vocabulary
from twofold.engine.structured import StructuredOutputs

TOOLS: list[dict[str, Any]] = [
    {"type": "function", "function": {"name": "weather", "parameters": {
        "type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
        "required": ["city"], "additionalProperties": False}}},
    {"type": "function", "function": {"name": "now"}},
]  # fmt: skip
HERMES = {"begin": '<tool_call>\n{"name": "', "middle": '", "arguments": ', "end": "}\n</tool_call>", "separator": "\n",
          "trigger": "<tool_call>"}  # fmt: skip
MISTRAL = {"open": "[TOOL_CALLS] [", "begin": '{"name": "', "middle": '", "arguments": ', "end": "}", "separator": ", ",
           "close": "]", "trigger": "[TOOL_CALLS]"}  # fmt: skip
SPECIAL = {"open": "<|im_start|>", "begin": "call ", "middle": "\n", "end": "\n", "close": "<|im_end|>",
           "trigger": "<|im_start|>"}  # fmt: skip
PYTHONIC: dict[str, Any] = {"open": "[", "begin": "", "middle": "(", "end": ")", "separator": ", ", "close": "]",
                            "pythonic": True}  # fmt: skip


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Reader:
    return Reader(tmp_path_factory.mktemp("tokenizer"))


def form(choice: Any, wrapping: dict[str, Any], **more: Any) -> StructuredOutputs:
    made = tools_grammar(TOOLS, choice, **wrapping, **more)
    assert made is not None
    return made


def hermes(name: str, arguments: str) -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


SUNNY, NOW = hermes("weather", '{"city": "Köln", "days": 3}'), hermes("now", "{}")


@pytest.mark.parametrize(
    ("choice", "more", "good", "bad"),
    [
        ("required", {}, [SUNNY, NOW, f"{SUNNY}\n{NOW}"],
         ["", "hello", f"hi {NOW}", hermes("weather", "{}"), hermes("nobody", "{}"), f"{NOW} "]),
        ("required", {"parallel": False}, [SUNNY], [f"{SUNNY}\n{NOW}"]),
        ("auto", {}, ["", "hello", SUNNY, f"hi {NOW}", f"{SUNNY}\n{NOW}", f"a {NOW} b {SUNNY} c"],
         [f"{NOW} and <tool_call>", hermes("nobody", "{}"), "<tool_call>", hermes("weather", '{"town": "x"}')]),
        ("auto", {"parallel": False}, ["", "hello", NOW, f"well {NOW}"], [f"{NOW}{NOW}"]),
        ({"type": "function", "function": {"name": "now"}}, {}, [NOW], [SUNNY, f"{NOW}\n{NOW}", ""]),
    ],
)  # fmt: skip
def test_hermes(reader: Reader, choice: Any, more: dict[str, Any], good: list[str], bad: list[str]) -> None:
    made = form(choice, HERMES, **more)
    assert [text for text in good if not reader.takes(made, text)] == []
    assert [text for text in bad if reader.takes(made, text)] == []


def test_a_list_of_calls(reader: Reader) -> None:
    made = form("required", MISTRAL)
    call = '{"name": "now", "arguments": {}}'
    assert reader.takes(made, f"[TOOL_CALLS] [{call}]") and reader.takes(made, f"[TOOL_CALLS] [{call}, {call}]")
    assert not reader.takes(made, "[TOOL_CALLS] []") and not reader.takes(made, f"[TOOL_CALLS] [{call}")
    auto = form("auto", MISTRAL)
    assert reader.takes(auto, "text") and reader.takes(auto, f"text [TOOL_CALLS] [{call}]")
    assert not reader.takes(auto, "[TOOL_CALLS] now")


def test_special_tokens_are_tokens_and_not_their_characters(reader: Reader) -> None:
    special = reader.tokenizer.special_tokens
    for choice in ("required", "auto"):
        matcher = reader.matchers.matcher(form(choice, SPECIAL))
        inside = reader.tokenizer.encode("call now\n{}\n")
        assert matcher.consume_tokens([special["<|im_start|>"], *inside, special["<|im_end|>"]])
        assert matcher.is_accepting()
    spelled = reader.tokenizer.encode("<|im_start|>")
    assert len(spelled) > 1 and not reader.matchers.matcher(form("required", SPECIAL)).consume_tokens(spelled)


PYTHON_TOOL = {"type": "function", "function": {"name": "f", "parameters": {
    "type": "object",
    "properties": {"a": {"type": "string"}, "b": {"type": "boolean"}, "c": {"enum": [None, "x", 1]},
                   "d": {"type": "array", "items": {"type": ["integer", "null"]}}, "e": {"type": "object"}, "g": {}},
    "required": ["b"]}}}  # fmt: skip


@pytest.mark.parametrize("text", [
    "[f(b=True)]", '[f(a="x\\n", b=False, c=None)]', '[f(b=True, d=[1, None, 2])]', "[f(b=True), f(b=False)]",
    '[f(b=True, c="x", e={"k": [True, {"n": None}]}, g=[1.5])]',
])  # fmt: skip
def test_pythonic_calls_are_python(reader: Reader, text: str) -> None:
    made = tools_grammar([PYTHON_TOOL], "required", **PYTHONIC)
    assert made is not None and reader.takes(made, text)
    assert isinstance(ast.parse(text, mode="eval").body, ast.List)


@pytest.mark.parametrize("text", [
    "[f()]", "[f(b=true)]", "[f(b=1)]", '[f(b=True, a="x")]', "[f(b=True, z=1)]", "[g(b=True)]", "[]", "[f(b=True,)]",
    '[f(b=True, c="y")]', "[f(b=True, d=[1.5])]",
])  # fmt: skip
def test_pythonic_calls_that_are_none(reader: Reader, text: str) -> None:
    made = tools_grammar([PYTHON_TOOL], "required", **PYTHONIC)
    assert made is not None and not reader.takes(made, text)


def test_when_nothing_is_enforced() -> None:
    assert tools_grammar(TOOLS, "none", **HERMES) is None and tools_grammar(TOOLS, None, **HERMES) is None
    assert tools_grammar([], "required", **HERMES) is None
    assert tools_grammar(TOOLS, "auto", **{**HERMES, "trigger": ""}) is None


@pytest.mark.parametrize(
    ("tools", "choice", "words"),
    [
        (TOOLS, {"type": "function", "function": {"name": "f"}}, "not among the tools"),
        (TOOLS, "maybe", "none, auto, required"),
        ([{}], "required", "no function with a name"),
        ([TOOLS[0], TOOLS[0]], "required", "as another is"),
    ],
)
def test_tools_that_are_none(tools: Any, choice: Any, words: str) -> None:
    with pytest.raises(RequestError, match=words):
        tools_grammar(tools, choice, **HERMES)


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
    made = StructuredOutputs(
        structural_tag={"type": "structural_tag", "format": {"type": "sequence", "elements": parts}}
    )
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
