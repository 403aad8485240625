"""Task files: what they may say, what is wrong with others, and the ones that come with the bundled model's recipes."""

from __future__ import annotations

import builtins
import io
import itertools
import json
import keyword
import tokenize
from pathlib import Path
from typing import Any

import pytest

from twofold.align.task import Task, fingerprint, read_prompts, read_task
from twofold.core import ConfigError
from twofold.data import documents
from twofold.data.dataset import Completion

SHIPPED = Path(__file__).resolve().parents[2] / "recipes" / "pybot" / "tasks"
REWARD = '[[rewards]]\nkind = "length"\nmost = 5\n'
KNOWN = {*dir(builtins), *itertools.chain.from_iterable(map(dir, (str, list, dict, set, int, tuple))), "self"}


def write(folder: Path, text: str, *rows: Any) -> Path:
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = folder / "small.toml"
    path.write_text(text + REWARD)
    return path


def test_a_task_and_its_prompts(tmp_path: Path) -> None:
    talk = [{"role": "user", "content": "Hi"}]
    rows = {"prompt": "def f(", "tests": ["assert f()"]}, {"prompt": talk, "answer": "Hello"}
    task = read_task(write(tmp_path, 'prompts = "rows.jsonl"\nk = [1, 4]\nsystem = "Be short."\n', *rows))
    assert (task.name, task.drawn, task.success) == ("small", 4, 1.0)
    one, other = read_prompts(task)
    assert (one.number, one.shown, one.columns) == (0, "def f(", {"tests": ["assert f()"]})
    assert (other.number, other.columns) == (1, {"answer": "Hello"})
    assert other.shown == [{"role": "system", "content": "Be short."}, *talk]
    assert read_prompts(task, 1) == [one]
    assert fingerprint([one]) != fingerprint([one, other]) == fingerprint(read_prompts(task))


def test_flags_win_over_the_file_and_a_text_may_be_what_a_user_says(tmp_path: Path) -> None:
    path = write(tmp_path, 'prompts = "rows.jsonl"\nk = [8]\n', {"prompt": "Hi"})
    task = read_task(path, {"k": ["2"], "samples": "0", "chat": True})
    assert (task.k, task.drawn) == ((2,), 0)
    assert read_prompts(task)[0].shown == [{"role": "user", "content": "Hi"}]


def test_questions_with_answers_are_a_task(tmp_path: Path) -> None:
    task = read_task(write(tmp_path, 'prompts = "python-docs-common"\n'))
    (first,) = read_prompts(task, 1)
    assert first.shown[-1]["role"] == "user"  # type: ignore[index]
    assert first.columns["answer"]


@pytest.mark.parametrize(
    ("text", "rows", "told"),
    [
        ('prompts = "rows.jsonl"\nk = [0]\n', (), "k must be"),
        ('prompts = "rows.jsonl"\nk = [4]\nsamples = 3\n', (), "less than the largest k, 4"),
        ('prompts = "rows.jsonl"\ntemperature = 0\n', (), "greedy answers come besides"),
        ('prompts = "rows.jsonl"\ntemprature = 1\n', (), "did you mean 'temperature'"),
        ('prompts = "elsewhere.jsonl"\n', (), "elsewhere.jsonl"),
        ('prompts = "rows.jsonl"\n', (), "no prompt in it"),
        ('prompts = "rows.jsonl"\n', ({"text": "x"},), "rows.jsonl, line 1"),
        ('prompts = "rows.jsonl"\n', ({"prompt": "x", "tools": [{"name": "f"}]},), "no tools"),
        ('prompts = "python-stdlib"\n', (), "rows with 'prompt' are needed"),
    ],
)
def test_what_is_wrong_is_said(text: str, rows: tuple[Any, ...], told: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=told):
        read_prompts(read_task(write(tmp_path, text, *rows)))


def test_a_task_without_a_reward_is_none(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"\[\[rewards\]\]"):
        Task(prompts="rows.jsonl", rewards=())


# ------------------------------------------------------------------------------------------- those that are shipped
def rows(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (SHIPPED / name).read_text(encoding="utf-8").splitlines()]


def renamed(code: str) -> str:
    """Code without documentation, every name of its own replaced by its number: equal for what differs in names."""
    names: dict[str, str] = {}
    words = []
    for token in tokenize.generate_tokens(io.StringIO(code + "\n").readline):
        word = token.string
        if token.type == tokenize.STRING and word.startswith('"""'):
            continue
        if token.type == tokenize.NAME and not keyword.iskeyword(word) and word not in KNOWN:
            word = names.setdefault(word, f"name{len(names)}")
        words.append(word if word.strip() else tokenize.tok_name[token.type])
    return " ".join(words)


@pytest.mark.parametrize("path", sorted(SHIPPED.glob("*.toml")), ids=lambda path: path.stem)
def test_shipped_tasks_are_read(path: Path) -> None:
    assert len(read_prompts(read_task(path))) >= 40


def test_what_is_measured_is_never_trained_on() -> None:
    train, valid = ({renamed(row["prompt"] + row["answer"]) for row in rows(f"tests.{part}.jsonl")} for part in PARTS)
    assert (len(train), len(valid)) == (80, 40)  # and none twice
    assert not train & valid
    begun, others = ({row["prompt"] for row in rows(f"parses.{part}.jsonl")} for part in PARTS)
    assert (len(begun), len(others)) == (65, 40)
    assert not begun & others


def test_nor_is_it_among_what_demonstrations_and_pairs_are_made_of() -> None:
    measured = {renamed(row["prompt"] + row["answer"]) for row in rows("tests.valid.jsonl")}
    for document in documents("python-functions"):
        assert isinstance(document.content, Completion)
        assert renamed(document.content.prompt + document.content.completion) not in measured, document.key
    for part in PARTS:
        asked = {row["prompt"] for row in rows(f"tests.{part}.jsonl")}
        assert {row["prompt"] for row in rows(f"../demonstrations.{part}.jsonl")} == asked
        assert {row["prompt"] for row in rows(f"../pairs.{part}.jsonl")} <= asked


def test_length_alone_is_right_in_half_of_the_held_out_pairs() -> None:
    found = [len(row["chosen"]) - len(row["rejected"]) for row in rows("../pairs.valid.jsonl")]
    assert sum(more > 0 for more in found) == sum(more < 0 for more in found) > 40


@pytest.mark.filterwarnings("ignore::SyntaxWarning")
@pytest.mark.parametrize("part", ("train", "valid"))
def test_demonstrations_pass_and_of_a_pair_only_the_chosen_one_does(part: str) -> None:
    tests = {row["prompt"]: row["tests"] for row in rows(f"tests.{part}.jsonl")}
    for row in rows(f"../demonstrations.{part}.jsonl"):
        assert passes(row["prompt"] + row["completion"], tests[row["prompt"]]), row
    for row in rows(f"../pairs.{part}.jsonl"):
        assert passes(row["prompt"] + row["chosen"], tests[row["prompt"]]), row
        assert not passes(row["prompt"] + row["rejected"], tests[row["prompt"]]), row


PARTS = ("train", "valid")


@pytest.mark.parametrize("part", PARTS)
def test_every_answer_passes_its_tests_and_a_wrong_one_does_not(part: str) -> None:
    for row in rows(f"tests.{part}.jsonl"):
        assert 2 <= len(row["tests"]) <= 5, row["prompt"]
        assert "\n" not in row["answer"]
        assert passes(row["prompt"] + row["answer"], row["tests"]), row["prompt"]
        assert not passes(row["prompt"] + " [][0]", row["tests"]), row["prompt"]


def passes(code: str, tests: list[str]) -> bool:
    scope: dict[str, Any] = {}
    try:
        for text in (code, *tests):
            exec(text, scope)
    except Exception:
        return False
    return True
