"""Rows for alignment: TRL's dataset types, verl's rows, and errors that name the line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from twofold.core import ConfigError
from twofold.data.dataset import Asked, Chat, Completion, Document, Judged, Preference, Text, documents
from twofold.data.preference import judged, judgements, preference, preferences
from twofold.data.prompts import asked, question

USER, GOOD, BAD = (
    {"role": role, "content": text} for role, text in (("user", "q"), ("assistant", "a"), ("assistant", "b"))
)
TOOL = {"type": "function", "function": {"name": "now", "parameters": {}}}


@pytest.mark.parametrize(
    ("row", "found"),
    [
        ({"prompt": "p", "chosen": "a", "rejected": "b"}, Preference("p", "a", "b")),
        ({"prompt": "p", "chosen": "a", "rejected": "b", "margin": 2}, Preference("p", "a", "b", 2.0)),
        (
            {"chosen": "The sky is blue.", "rejected": "The sky is green."},
            Preference("The sky is", " blue.", " green."),
        ),
        ({"chosen": "blue", "rejected": "blue sky"}, Preference("blue", "", " sky")),
        ({"chosen": "x", "rejected": "y"}, Preference("", "x", "y")),
        ({"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}, Preference((USER,), (GOOD,), (BAD,))),
        ({"chosen": [USER, GOOD], "rejected": [USER, BAD]}, Preference((USER,), (GOOD,), (BAD,))),
        ({"prompt": "q", "chosen": [USER, GOOD], "rejected": [USER, BAD]}, Preference((USER,), (GOOD,), (BAD,))),
        ({"prompt": "q", "chosen": [GOOD], "rejected": [BAD]}, Preference((USER,), (GOOD,), (BAD,))),
        (
            {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD], "tools": json.dumps([TOOL])},
            Preference((USER,), (GOOD,), (BAD,), 0.0, (TOOL,)),
        ),
    ],
)
def test_preferences(row: dict[str, Any], found: Preference) -> None:
    assert preference(row) == found
    assert judged(row) == found


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "p", "chosen": "a"}, "'rejected' must be"),
        ({"prompt": "p", "chosen": "a", "rejected": "a"}, "the same"),
        ({"prompt": "p", "chosen": "a", "rejected": [BAD]}, "both strings"),
        ({"prompt": [USER], "chosen": "a", "rejected": "b"}, "of messages needs"),
        ({"prompt": "p", "chosen": "a", "rejected": "b", "margin": "1"}, "'margin' must be a number"),
        ({"prompt": "p", "chosen": "a", "rejected": "b", "tools": [1]}, "'tools' must be"),
        ({"chosen": [GOOD], "rejected": [BAD]}, "in common"),
        ({"chosen": [USER, GOOD], "rejected": [USER]}, "an answer each"),
        ({"prompt": [], "chosen": [GOOD], "rejected": [BAD]}, "'prompt' must be"),
    ],
)
def test_bad_preferences(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"chosen": "a", "rejected": "b"}) + "\n\n" + json.dumps(row))
    with pytest.raises(ConfigError, match=message) as error:
        list(preferences(str(path)))
    assert "rows.jsonl, line 3:" in str(error.value)


def test_judged_rows(tmp_path: Path) -> None:
    rows = [
        {"prompt": "p", "completion": "c", "label": False},
        {"prompt": [USER], "completion": [GOOD], "label": True},
        {"prompt": "p", "chosen": "a", "rejected": "b"},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    assert [row for _, row in judgements(str(path))] == [
        Judged("p", "c", False), Judged((USER,), (GOOD,), True), Judged("p", "a", True), Judged("p", "b", False)
    ]  # fmt: skip
    for bad, message in [
        ({"prompt": "p", "completion": "c"}, "'label' must be true or false"),
        ({"prompt": "p", "completion": [GOOD], "label": True}, "both"),
    ]:
        path.write_text(json.dumps(bad))
        with pytest.raises(ConfigError, match=f"line 1: .*{message}"):
            list(judgements(str(path)))
    (tmp_path / "plain.txt").write_text("text")
    with pytest.raises(ConfigError, match=r"plain.txt holds text: rows with 'chosen'"):
        list(preferences(str(tmp_path / "plain.txt")))


def test_prompts_carry_their_columns() -> None:
    assert asked({"prompt": "p", "answer": 4}) == Asked("p", {"answer": 4})
    verl = {
        "data_source": "gsm8k", "prompt": [USER], "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": "72"}, "extra_info": {"index": 1},
    }  # fmt: skip
    found = asked(verl)
    assert found.prompt == (USER,) and found.columns["ground_truth"] == "72"
    assert {**found.columns} == {**{k: v for k, v in verl.items() if k != "prompt"}, "ground_truth": "72"}
    with pytest.raises(ValueError, match="'prompt' must be"):
        asked({"question": "?"})


def test_language_rows_of_messages(tmp_path: Path) -> None:
    call = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "now", "arguments": {}}}]}
    rows = [
        {"prompt": [USER], "completion": [GOOD]},
        {"messages": [USER, call], "tools": [TOOL]},
        {"prompt": "p", "completion": "c", "label": True},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    assert [document.content for document in documents(str(path))] == [
        Chat((USER, GOOD), asked=1), Chat((USER, {**call, "content": None}), (TOOL,)), Completion("p", "c")
    ]  # fmt: skip
    path.write_text(json.dumps({"prompt": "p", "chosen": "a", "rejected": "b"}))
    with pytest.raises(ConfigError, match="preferences are read by"):
        list(documents(str(path)))


def test_parquet_is_said_to_be_unread(tmp_path: Path) -> None:
    (tmp_path / "rows.parquet").write_bytes(b"PAR1")
    with pytest.raises(ConfigError, match="Parquet, and Twofold reads JSONL"):
        list(documents(str(tmp_path / "rows.parquet")))


def test_no_prompt_is_on_both_sides() -> None:
    sides = {
        Document(content).held_out(0.5)
        for prompt in ["one"]
        for content in (Asked(prompt, {"a": 1}), Judged(prompt, "x", True), Preference(prompt, "a", "b"))
    }
    assert len(sides) == 1
    held = [Document(Preference(str(n), "a", "b")).held_out(0.25) for n in range(2000)]
    assert 400 < sum(held) < 600


def test_what_chats_were_hashed_as_they_still_are() -> None:
    """Held-out chats stay held out, run after run."""
    plain = json.dumps(["chat", [USER]], sort_keys=True, ensure_ascii=True).encode()
    assert Document(Chat((USER,))).canonical() == plain
    assert Document(Chat((USER,), (TOOL,))).canonical() != plain != Document(Chat((USER,), asked=1)).canonical()


def test_what_has_an_answer_asks_too() -> None:
    assert question(Document(Completion("p", "c")), "x") == Asked("p", {"answer": "c"})
    assert question(Document(Chat((USER, GOOD, USER, BAD), (TOOL,))), "x") == Asked(
        (USER, GOOD, USER), {"answer": "b"}, (TOOL,)
    )
    for content, kind in ((Text("t"), "text"), (Chat((USER,)), "chat"), (Preference("p", "a", "b"), "preference")):
        with pytest.raises(ConfigError, match=f"here holds {kind}: rows with 'prompt'"):
            question(Document(content, where="here"), "x")
