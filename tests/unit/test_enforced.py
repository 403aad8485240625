"""Enforced calls: the grammar takes what the form writes, and nothing else; what it takes is heard, and fits."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.unit import call_templates
from twofold.core import RequestError
from twofold.data import Tokenizer
from twofold.data.speech import FORMS, Heard, Manner
from twofold.engine.grammar.matchers import Matchers, Stand
from twofold.engine.grammar.vocabulary import Vocabulary
from twofold.engine.structured import StructuredOutputs
from twofold.serve.enforced import form_of
from twofold.serve.tools import Function, FunctionName, Named, Tool, Tools, asked

CITY = {
    "type": "object",
    "properties": {"city": {"type": "string"}},
    "required": ["city"],
    "additionalProperties": False,
}
EMPTY = {"type": "object", "properties": {}, "additionalProperties": False}
GIVEN = [
    Tool(Function("weather", parameters=CITY, strict=True)),
    Tool(Function("now", parameters=EMPTY, strict=True)),
]
REQUIRED, AUTO = asked(GIVEN, "required", None), asked(GIVEN, None, None)
NAMED = asked(GIVEN, Named(FunctionName("now")), None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("enforced")
    call_templates.tokenizer(path)
    return path


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer.load(folder)


@pytest.fixture(scope="module")
def matchers(folder: Path, tokenizer: Tokenizer) -> Matchers:
    return Matchers(Vocabulary(folder, tokenizer.vocab_size, tokenizer.eos_ids))


def speaker(name: str, tokenizer: Tokenizer, thoughts: str = "none") -> Manner:
    return Manner.of((), tokenizer.added_tokens, calls=name, thoughts=thoughts)


def wanted(manner: Manner, tools: Tools, form: StructuredOutputs | None = None, *, opened: bool = False) -> Any:
    found = form_of(manner, tools, form, opened=opened)
    assert found is not None
    return found


def takes(matchers: Matchers, form: StructuredOutputs, tokenizer: Tokenizer, text: str) -> bool:
    """Whether the whole text fits, read as the vocabulary's tokens, and the answer may end behind it."""
    try:
        Stand(matchers, form, [*tokenizer.encode(text, special=True), tokenizer.eos_ids[0]])
    except RequestError:
        return False
    return True


def written(manner: Manner, *calls: tuple[str, dict[str, Any]]) -> str:
    way = manner.forced[1]
    python = way.pythonic
    return way.write(
        [(n, ", ".join(f"{k}={json.dumps(v)}" for k, v in a.items()) if python else json.dumps(a)) for n, a in calls]
    )


@pytest.mark.parametrize("name", FORMS)
def test_calls_are_taken_and_nothing_else(name: str, tokenizer: Tokenizer, matchers: Matchers) -> None:
    manner = speaker(name, tokenizer)
    weather, now = ("weather", {"city": "Paris"}), ("now", {})
    both, one = written(manner, weather, now), written(manner, now)
    form = wanted(manner, REQUIRED)
    assert takes(matchers, form, tokenizer, both) and takes(matchers, form, tokenizer, one)
    for wrong in ("", "Hello", one + "x", written(manner, ("weather", {})), written(manner, ("other", {})), one[:-1]):
        assert not takes(matchers, form, tokenizer, wrong)
    named = wanted(manner, NAMED)
    assert takes(matchers, named, tokenizer, one)
    assert not takes(matchers, named, tokenizer, both) and not takes(matchers, named, tokenizer, one + one)
    single = wanted(manner, asked(GIVEN, "required", False))
    assert takes(matchers, single, tokenizer, one) and not takes(matchers, single, tokenizer, both)


@pytest.mark.parametrize("name", FORMS)
def test_what_begins_as_a_call_of_a_strict_tool_fits(name: str, tokenizer: Tokenizer, matchers: Matchers) -> None:
    manner = speaker(name, tokenizer)
    form = wanted(manner, AUTO)
    good, bad = written(manner, ("weather", {"city": "x"})), written(manner, ("weather", {"town": "x"}))
    assert takes(matchers, form, tokenizer, "Just text [or] {not}.") and takes(matchers, form, tokenizer, good)
    assert not takes(matchers, form, tokenizer, bad)
    if name not in ("llama3_json", "pythonic"):  # whose calls are the whole answer
        assert takes(matchers, form, tokenizer, "First: " + good)
        assert not takes(matchers, form, tokenizer, "First: " + bad)


def test_there_is_room_for_a_thought(tokenizer: Tokenizer, matchers: Matchers) -> None:
    manner = speaker("hermes", tokenizer, "qwen3")
    call = written(manner, ("now", {}))
    free, opened = wanted(manner, NAMED), wanted(manner, NAMED, opened=True)
    assert takes(matchers, free, tokenizer, call)
    assert takes(matchers, free, tokenizer, f"<think>\nhm\n</think>\n\n{call}")
    assert takes(matchers, opened, tokenizer, f"hm\n</think>\n\n{call}")
    assert not takes(matchers, opened, tokenizer, call)
    json_form = StructuredOutputs(json={"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]})
    for opening, first in ((True, "hm</think>\n"), (False, "<think>hm</think>\n"), (False, "")):
        form = wanted(manner, Tools(), json_form, opened=opening)
        assert takes(matchers, form, tokenizer, first + '{"a": 1}')
        assert not takes(matchers, form, tokenizer, first + '{"a": "x"}')
    assert form_of(speaker("hermes", tokenizer), Tools(), json_form, opened=False) is json_form
    for other, text in ((StructuredOutputs(regex="a+"), "aa"), (StructuredOutputs(choice=("b", "c")), "c")):
        assert takes(matchers, wanted(manner, Tools(), other), tokenizer, "<think>x</think>" + text)


def test_an_answer_calls_or_has_its_form(tokenizer: Tokenizer, matchers: Matchers) -> None:
    manner = speaker("hermes", tokenizer)
    call, bad = written(manner, ("now", {})), written(manner, ("weather", {"town": "x"}))
    free = asked([Tool(each.function) for each in GIVEN], None, None)
    form = wanted(manner, free, StructuredOutputs(json={"type": "array", "items": {"type": "integer"}}))
    assert takes(matchers, form, tokenizer, "[1, 2]") and takes(matchers, form, tokenizer, call)
    assert not takes(matchers, form, tokenizer, "text") and not takes(matchers, form, tokenizer, bad)
    with pytest.raises(RequestError, match="exclude"):
        form_of(manner, free, StructuredOutputs(json_object=True, disable_any_whitespace=True), opened=False)


def test_a_form_and_enforced_calls_exclude_each_other(tokenizer: Tokenizer) -> None:
    manner = speaker("hermes", tokenizer)
    with pytest.raises(RequestError, match="no room") as error:
        form_of(manner, REQUIRED, StructuredOutputs(json_object=True), opened=False)
    assert error.value.param == "tool_choice"
    assert form_of(manner, asked([Tool(Function("f"))], None, None), None, opened=False) is None


@pytest.mark.parametrize("name", FORMS)
def test_what_chance_writes_under_the_grammar_is_heard_as_calls(
    name: str, tokenizer: Tokenizer, matchers: Matchers
) -> None:
    manner, dice = speaker(name, tokenizer), random.Random(name)
    for _ in range(8):
        stand, ids = Stand(matchers, wanted(manner, REQUIRED), []), []
        while len(ids) < 400:
            forced, mask = stand.next()
            if forced:
                stand.advance(forced)
                ids += forced
                continue
            if not mask:
                break
            able = [token for token in range(tokenizer.vocab_size) if mask[token >> 3] >> (token & 7) & 1]
            ends = [token for token in able if token in tokenizer.eos_ids or tokenizer.token(token) in ('"', "}", "]")]
            token = dice.choice(ends if ends and dice.random() < 0.5 else able)
            if token in tokenizer.eos_ids:
                break
            stand.advance([token])
            ids.append(token)
        else:
            continue  # chance did not find its end
        text = tokenizer.decode(ids, skip_special_tokens=False)
        listener = replace(manner.forced[0], tokens={}).listen(tools=REQUIRED.given)
        heard = Heard().add(listener.push(text)).add(listener.finish())
        assert not heard.content and listener.complete, text
        for called, arguments in heard.calls:
            found = json.loads(arguments)
            assert set(found) == ({"city"} if called == "weather" else set())
