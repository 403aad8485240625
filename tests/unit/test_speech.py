"""What an answer says: every form, cut anywhere, is the same message; what is no call is text; nothing is lost."""

from __future__ import annotations

import itertools
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit import call_templates
from twofold.core import ConfigError
from twofold.data import TextStream, Tokenizer
from twofold.data.speech import FORMS, THOUGHTS, Heard, Listener, Manner
from twofold.data.speech.form import ALWAYS, DONE, OTHER

PROPERTIES = {"city": {"type": "string"}, "days": {"type": "integer"}, "more": {}, "on": {"type": ["boolean", "null"]}}
TOOLS: list[dict[str, Any]] = [
    {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": PROPERTIES}}},
    {"type": "function", "function": {"name": "now"}},
]
QUESTION = [{"role": "user", "content": "How is it?"}]
MARKS = sorted({mark for form in FORMS.values() for mark in form.marks} | {"<think>", "</think>", "[THINK]"})


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return call_templates.tokenizer(tmp_path_factory.mktemp("speech"))


def manner(name: str, thoughts: str = "qwen3", tokenizer: Tokenizer | None = None) -> Manner:
    return Manner.of((), tokenizer.added_tokens if tokenizer else {}, calls=name, thoughts=thoughts)


def heard(listener: Listener, *pieces: str) -> Heard:
    found = Heard()
    for piece in pieces:
        found.add(listener.push(piece))
    return found.add(listener.finish())


def cut(text: str, places: list[int]) -> list[str]:
    borders = [0, *sorted(place % (len(text) + 1) for place in places), len(text)]
    return [text[start:end] for start, end in itertools.pairwise(borders)]


def called(heard: Heard) -> list[tuple[str, Any]]:
    return [(name, json.loads(arguments)) for name, arguments in heard.calls]


# ------------------------------------------------------------------------------------------------------- the tables


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_a_table_is_whole(form: Any) -> None:
    """Every state can be reached and left, every move leads somewhere, and no mark of a state begins another of it."""
    ends = {where for where, *_ in form.moves.values()}
    assert ends - {"start", "text"} == set(form.reads) == {state for state, _ in form.moves} - set(ALWAYS)
    for state in form.states:
        marks = [mark for mark in form.leaving(state) if mark not in (DONE, OTHER)]
        assert not [(a, b) for a in marks for b in marks if a != b and a.startswith(b)]
    assert form.signs


# ------------------------------------------------------------------------------------------------------- round trips

ARGUMENTS = st.fixed_dictionaries(
    {},
    optional={
        "city": st.sampled_from(
            ["Paris", "", "a \"b\" 'c' \\", "línea\nzwei 🙂", "</tool_call>", "{}]", "true", "12", " x "]
        ),
        "days": st.integers(-(10**20), 10**20),
        "more": st.sampled_from([[], {}, [1.5, -2e-7, None], {"a": {"b": ["c", True]}}, 0.1]),
        "on": st.sampled_from([True, False, None]),
    },
)
ANSWERS = st.fixed_dictionaries(
    {
        "content": st.sampled_from(["", "Let me look.", "I will: a < b [c] {d}", "naïve 🙂\ntwo lines"]),
        "thought": st.sampled_from(["", "Hm.", "First {this},\n\nthen [that] <b>"]),
        "calls": st.lists(st.tuples(st.sampled_from(["weather", "now"]), ARGUMENTS), max_size=3),
    }
)


def message(answer: dict[str, Any]) -> dict[str, Any]:
    calls = [
        {"id": f"call_{place}", "type": "function", "function": {"name": name, "arguments": json.dumps(arguments)}}
        for place, (name, arguments) in enumerate(answer["calls"])
    ]
    found: dict[str, Any] = {"role": "assistant", "content": answer["content"]}
    found |= {"reasoning_content": answer["thought"]} if answer["thought"] else {}
    return found | ({"tool_calls": calls} if calls else {})


@pytest.mark.parametrize("name", call_templates.CALLS)
@settings(max_examples=25)
@given(
    answer=ANSWERS, places=st.lists(st.integers(0, 2000), max_size=12), steps=st.lists(st.integers(1, 9), min_size=1)
)
def test_what_was_rendered_is_heard_however_it_is_cut(
    name: str, tokenizer: Tokenizer, answer: dict[str, Any], places: list[int], steps: list[int]
) -> None:
    template, form = call_templates.template(name), name.removesuffix("_new")
    given: dict[str, Any] = {"tools": TOOLS}
    if form in ("glm45", "qwen3_coder"):  # written without quotes: what a value is, the tool's schema says
        answer["calls"] = [(call, arguments if call == "weather" else {}) for call, arguments in answer["calls"]]
    chat = template.fitted([*QUESTION, message(answer)], tools=True)
    prompt = template.encode(tokenizer, QUESTION, **given)
    whole = template.encode(tokenizer, chat, add_generation_prompt=False, **given)
    assert whole[: len(prompt)] == prompt
    ids = whole[len(prompt) : -2]  # without the end of the turn and its line break
    text = tokenizer.decode(ids, skip_special_tokens=False)

    expected = [(call, arguments) for call, arguments in answer["calls"]]
    # as characters, in one piece and cut at will
    spelled = manner(form)
    one = heard(spelled.listen(tools=TOOLS), text)
    assert (one.content, one.thought, called(one)) == (answer["content"], answer["thought"], expected)
    assert heard(spelled.listen(tools=TOOLS), *cut(text, places)) == one
    assert heard(spelled.listen(tools=TOOLS), *text) == one
    # as tokens, one by one and several at a time, where only the tokens themselves are marks
    exact = manner(form, tokenizer=tokenizer)
    for sizes in ([1], steps):
        assert by_tokens(exact, tokenizer, ids, sizes) == one


def by_tokens(manner: Manner, tokenizer: Tokenizer, ids: list[int], sizes: list[int], **given: Any) -> Heard:
    stream, listener = TextStream(tokenizer, marks=manner.kept(calls=True), **given), manner.listen(tools=TOOLS)
    found, at, shown, turn = Heard(), 0, 0, 0
    while at < len(ids):
        size = sizes[turn % len(sizes)]
        text = stream.push(ids[at : at + size])
        at, turn, start, shown = at + size, turn + 1, shown, shown + len(text)
        found.add(listener.push(text, [(place - start, mark) for place, mark in stream.places(shown)]))
    text = stream.finish()
    found.add(listener.push(text, [(place - shown, mark) for place, mark in stream.places(shown + len(text))]))
    return found.add(listener.finish())


# ------------------------------------------------------------------------------------------------------- anything

FRAGMENTS = [
    *MARKS,
    *('{"name": "weather", "arguments": {"city": "x"}}', '{"name": "now", "parameters": {}}', '{"name": "', "weather"),
    *('"arguments": {', '{"days": 1', "}", "]", "[", "weather(city='x", "now()", "(", ")", ",", ";", "function", "\n"),
    *(" ", '"', "\\", "'", "hello ", "12", "null", "é", "🙂", "```", "```json\n", "<", "a=1", "'''", "r'"),
]


@pytest.mark.parametrize("name", FORMS)
@settings(max_examples=60)
@given(
    pieces=st.lists(st.sampled_from(FRAGMENTS), max_size=14), places=st.lists(st.integers(0, 500), max_size=8),
    start=st.sampled_from(["start", "opened", "thought"]), most=st.sampled_from([None, 1]),
)  # fmt: skip
def test_anything_is_heard_the_same_however_it_is_cut(
    name: str, pieces: list[str], places: list[int], start: str, most: int | None
) -> None:
    text = "".join(pieces)

    def listener() -> Listener:
        return manner(name).listen(tools=TOOLS, start=start, most=most)

    one = heard(listener(), text)
    assert heard(listener(), *cut(text, places)) == heard(listener(), *text) == one
    told = one.thought + one.content
    if most is None and not one.calls:  # nothing but white space and the marks of a thought was left out
        left = text.replace("<think>", "").replace("</think>", "")
        assert "".join(told.replace("<think>", "").replace("</think>", "").split()) == "".join(left.split())


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("mark", ["<tool_call>", "[TOOL_CALLS]", "{", "[", "<|python_tag|>", "<｜tool▁calls▁begin｜>"])
def test_hostile_answers_take_linear_time(name: str, mark: str) -> None:
    for text in (
        mark * 3000,
        mark + '{"name": ' * 3000,
        mark + "[" * 20_000,
        mark + '{"a":"' + mark * 3000,
        mark + " " * 20_000,
    ):
        began = time.monotonic()
        assert heard(manner(name).listen(tools=TOOLS), text).calls == []
        assert time.monotonic() - began < 2


MALFORMED = [
    ("hermes", "<tool_call>no</tool_call> so", "<tool_call>no</tool_call> so"),
    ("hermes", '<tool_call>{"name": 5}</tool_call>', '<tool_call>{"name": 5}</tool_call>'),
    ("hermes", '<tool_call>{"arguments": {}}</tool_call>', '<tool_call>{"arguments": {}}</tool_call>'),
    ("hermes", 'x <tool_call>{"name": "now", "argu', 'x <tool_call>{"name": "now", "argu'),
    ("hermes", '<tool_call>{"name": "now", "arguments": "x"}', '<tool_call>{"name": "now", "arguments": "x"}'),
    ("mistral", "[TOOL_CALLS] none at all", "[TOOL_CALLS] none at all"),
    ("mistral", '[TOOL_CALLS][{"name"', '[TOOL_CALLS][{"name"'),
    ("llama3_json", '{"name": "Ada", "parameters": {}}', '{"name": "Ada", "parameters": {}}'),
    ("llama3_json", '{"a": 1}\n', '{"a": 1}\n'),
    ("llama3_json", "Say {\"name\": \"now\"}", "Say {\"name\": \"now\"}"),
    ("pythonic", "[1, 2, 3]", "[1, 2, 3]"),
    ("pythonic", "[print(1)]", "[print(1)]"),
    ("deepseek_v3", "<｜tool▁calls▁begin｜>oh", "<｜tool▁calls▁begin｜>oh"),
    ("qwen3_coder", "<tool_call>\n<function=a b>", "<tool_call>\n<function=a b>"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "text", "content"), MALFORMED)
def test_what_is_no_call_is_content(name: str, text: str, content: str) -> None:
    assert heard(manner(name).listen(tools=TOOLS), *text) == Heard(content)


def test_what_breaks_after_it_began_stays_and_the_rest_is_content() -> None:
    listener = manner("hermes").listen(tools=TOOLS)
    found = heard(listener, '<tool_call>{"name": "now", "arguments": {"a": 1]}</tool_call> then')
    assert found == Heard("]}</tool_call> then", calls=[("now", '{"a": 1')])
    listener = manner("hermes").listen(tools=TOOLS)
    found = heard(listener, '<tool_call>{"name": "now", "arguments": {"a": [1, 2')
    assert found.calls == [("now", '{"a": [1, 2')] and not listener.complete


ARRIVING = [
    ("hermes", '<tool_call>{"name": "weather", "arguments": {"city": "Paris, in France'),
    ("mistral", '[TOOL_CALLS]weather[ARGS]{"city": "Paris, in France'),
    ("pythonic", "[weather(city='Paris, in France"),
    ("qwen3_coder", "<tool_call>\n<function=weather>\n<parameter=city>\nParis, in France"),
    ("deepseek_v31", '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>weather<｜tool▁sep｜>{"city": "Paris, in France'),
]


@pytest.mark.parametrize(("name", "text"), ARRIVING)
def test_arguments_are_told_as_they_arrive(name: str, text: str) -> None:
    found = Heard().add(manner(name).listen(tools=TOOLS).push(text))
    assert found.calls == [("weather", '{"city": "Paris, in France')]


@pytest.mark.parametrize(
    ("text", "arguments"),
    [
        ("a=0x10", None), ("a=1_000", 1000), ("a=-.5", -0.5), ("a=5.", 5.0), ("a=1e999", None), ("a=007", None),
        ("a=(1, 'b',)", [1, "b"]), ("a={'k': {'l': []}}", {"k": {"l": []}}), ("a={1: 2}", None), ("a=True", True),
        ("a=None", None), ("a='\\x41\\u00e9\\U0001f642\\n\\'\\z'", "Aé🙂\n'\\z"), ("a=r'\\d'", "\\d"), ("a=b'x'", "x"),
        ("a='''x'y\n'''", "x'y\n"), ('a=""', ""), ("a='\\ud800'", None), ("a=open('x')", None), ("a=f'x'", None),
        ("a=x", None), ("1", None), ("a=[" * 100, None), ("a=1 if 1 else 2", None), ("a=-True", None),
    ],
)  # fmt: skip
def test_python_is_read_and_never_run(text: str, arguments: Any) -> None:
    found = heard(manner("pythonic").listen(tools=TOOLS), f"[now({text})]")
    whole = bool(found.calls) and not found.content
    assert whole == (arguments is not None or text == "a=None")
    if whole:
        assert json.loads(found.calls[0][1]) == {"a": arguments}


def test_json_in_every_order_and_with_line_breaks_in_strings() -> None:
    text = '<tool_call>{"id": [1], "arguments": {"city": "a\nb"}, "name": "weather"}</tool_call>'
    assert called(heard(manner("hermes").listen(tools=TOOLS), *text)) == [("weather", {"city": "a\nb"})]
    text = '<tool_call>{"name": "weather", "arguments": "{\\"city\\": \\"x\\"}"}</tool_call>'
    assert called(heard(manner("hermes").listen(tools=TOOLS), *text)) == [("weather", {"city": "x"})]
    for text in ('{"name": "now"}', '{"name": "now", "arguments": null}'):
        assert called(heard(manner("hermes").listen(tools=TOOLS), "<tool_call>", text)) == [("now", {})]


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_what_a_grammar_makes_a_model_write_is_heard(form: Any) -> None:
    for tokens in ({}, {1: "[ARGS]"}):
        speaker, way = Manner(form, None, tokens).forced
        city = "city='x'" if way.pythonic else '{"city": "x"}'
        text = way.write([("weather", city), ("now", "" if way.pythonic else "{}")])
        listener = replace(speaker, tokens={}).listen(tools=TOOLS)
        assert called(heard(listener, *text)) == [("weather", {"city": "x"}), ("now", {})] and listener.complete


def test_one_call_is_enough_when_one_was_asked_for() -> None:
    listener = manner("hermes").listen(tools=TOOLS, most=1)
    call = '<tool_call>{"name": "now", "arguments": {}}</tool_call>\n'
    assert heard(listener, call * 3).calls == [("now", "{}")] and listener.full


# ------------------------------------------------------------------------------------------------------- thoughts


@pytest.mark.parametrize("row", THOUGHTS.values(), ids=THOUGHTS)
@pytest.mark.parametrize("opened", [True, False])
def test_thoughts_are_told_apart(row: Any, opened: bool) -> None:
    speaker = Manner(None, row)
    prompt = f"...assistant\n{row.opens}\n" if opened else "...assistant\n"
    text = f"{'' if opened else row.opens}\nfirst\n\nsecond\n{row.closes}\n\nThe answer.\n"
    for pieces in ([text], list(text)):
        listener = speaker.listen(start=speaker.start(prompt))
        assert heard(listener, *pieces) == Heard("The answer.\n", "first\n\nsecond")


def test_a_thought_that_never_ends_is_one_and_a_quoted_mark_is_none() -> None:
    speaker = manner("hermes")
    assert heard(speaker.listen(), "<think>so and so") == Heard("", "so and so")
    assert heard(speaker.listen(), "The tag <think> opens") == Heard("The tag <think> opens")
    assert heard(speaker.listen(start="text"), "</think> x") == Heard("</think> x")


def test_where_a_thought_begins_is_read_from_the_prompt() -> None:
    qwen, r1 = manner("hermes"), manner("hermes", "deepseek_r1")
    assert [qwen.start(end) for end in ("a\n", "<think>\n", "<think>\n\n</think>\n\n")] == ["start", "opened", "start"]
    assert [r1.start(end) for end in ("a\n", "<think>\n", "</think>\n")] == ["opened", "opened", "start"]
    assert [qwen.start("x", said) for said in ("a", "<think>b", "<think>b</think>c")] == ["text", "thought", "text"]


def test_the_manner_is_found_by_the_template_or_by_name(tokenizer: Tokenizer) -> None:
    for name in call_templates.CALLS:
        found = Manner.of(call_templates.template(name).sources, {})
        assert found.calls is FORMS[name.removesuffix("_new")] and found.thoughts is THOUGHTS["qwen3"]
    assert not Manner.of(("{{ messages }}",), {})
    assert Manner.of((), tokenizer.added_tokens).thoughts is THOUGHTS["mistral"]
    assert Manner.of((), {}, calls="qwen", thoughts="none") == Manner(FORMS["hermes"], None)
    with pytest.raises(ConfigError, match="did you mean 'hermes'"):
        Manner.of((), {}, calls="hermess")
    with pytest.raises(ConfigError, match="deepseek_r1"):
        Manner.of((), {}, thoughts="deepseek_r2")


def test_text_that_spells_a_mark_is_text_where_the_vocabulary_has_the_token(tokenizer: Tokenizer) -> None:
    speaker = manner("hermes", tokenizer=tokenizer)
    text = '<tool_call>{"name": "now", "arguments": {}}</tool_call>'
    assert by_tokens(speaker, tokenizer, tokenizer.encode(text, special=True), [1]).calls == [("now", "{}")]
    quoted = [token for character in text for token in tokenizer.encode(character)]
    assert by_tokens(speaker, tokenizer, quoted, [1]) == Heard(text)


def test_a_stop_string_may_cut_a_mark_or_a_call(tokenizer: Tokenizer, tmp_path: Path) -> None:
    speaker = manner("hermes", tokenizer=tokenizer)
    ids = tokenizer.encode('a<tool_call>{"name": "now", "arguments": {"b": 1}}</tool_call>b', special=True)
    assert by_tokens(speaker, tokenizer, ids, [1], stop=["b"]).calls == [("now", '{"')]
    assert by_tokens(speaker, tokenizer, ids, [1], stop=["</tool"]).calls == [("now", '{"b": 1}')]
    assert by_tokens(speaker, tokenizer, ids, [3], stop=["call>{"]) == Heard("a<tool_")
