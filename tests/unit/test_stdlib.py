"""The library as documents, its documentation strings as chats, and a vocabulary trained on both."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from twofold.core import ConfigError
from twofold.data import ChatTemplate, Tokenizer, documents
from twofold.data.bpe import SPECIAL, VocabularyConfig, train_tokenizer
from twofold.data.dataset import Chat, Text
from twofold.data.questions import WHAT, tier_of
from twofold.data.stdlib import source_files, summary


@pytest.fixture(scope="module")
def docs() -> list[tuple[str, str, str]]:
    """(name, question, answer) of the whole source."""
    found = []
    for document in documents("python-docs"):
        assert isinstance(document.content, Chat) and document.key
        texts = [message["content"] for message in document.content.messages if message["role"] != "system"]
        found += [(document.key.split()[1], texts[-2], texts[-1])]
    return found


def test_source_is_stable_and_without_tests() -> None:
    plain = [path.as_posix() for path in source_files()]
    assert plain == sorted(plain) and any(path.endswith("/json/decoder.py") for path in plain)
    assert not [path for path in plain if {"test", "tests", "site-packages", "encodings"} & set(Path(path).parts)]
    first = [document for document, _ in zip(documents("python-stdlib"), range(3))]
    assert all(isinstance(document.content, Text) and document.key for document in first)


@pytest.mark.parametrize(
    ("doc", "expected"),
    [
        ("Return the number of items in a container.", "Return the number of items in a container."),
        (
            "D.keys() -> a set-like object providing a view on D's keys",
            "Return a set-like object providing a view on D's keys.",
        ),
        ("D.clear() -> None.  Remove all items from D.", "Remove all items from D."),
        (
            "max(iterable) -> value\nmax(a, b) -> value\n\nWith one argument, return\nits biggest item.",
            "With one argument, return its biggest item.",
        ),
        ("f(a, b=(1, 2))\n\nDo one thing. Do two. Do three. Do four.", "Do one thing. Do two. Do three."),
        ("x", ""),
        (None, ""),
        (">>> f(1)\n2", ""),
    ],
)
def test_summary(doc: str | None, expected: str) -> None:
    assert summary(doc) == expected


def test_questions_have_their_answers(docs: list[tuple[str, str, str]]) -> None:
    answers = {question: answer for _, question, answer in docs}
    assert answers["What does len do?"] == "len returns the number of items in a container."
    assert answers["What does os.path.join do?"].startswith("os.path.join joins two or more pathname components")
    assert "end of the list" in answers["What does append do?"]
    assert answers["What are the arguments of math.pow?"].startswith("math.pow(x, y) returns")
    assert answers["How do I get the number of items in a container?"].startswith("Use len:")
    assert "JSON" in answers["What does json.dumps do?"]
    assert all(question and 10 < len(answer) < 450 for _, question, answer in docs)


def test_well_known_names_have_every_wording(docs: list[tuple[str, str, str]]) -> None:
    assert [tier_of(name) for name in ("len", "os.path.join", "shutil.copy", "wave.open", "a.b.c.d")] == [1, 1, 2, 3, 0]
    asked = {question for name, question, _ in docs if name == "len"}
    assert {wording.format(n="len", k="function") for wording in WHAT} <= asked
    common = list(documents("python-docs-common"))
    assert 250 < len({d.key for d in common}) < 500 and not any(d.held_out(1.0) for d in common)
    held = [d for d in documents("python-docs") if d.held_out(0.05)]
    assert held and all(tier_of((d.key or "").split()[1]) == 3 for d in held)


def test_vocabulary(tmp_path: Path) -> None:
    source = tmp_path / "text.txt"
    source.write_text("def f(self):\n        return self._value + 1\n\nclass A:\n    pass\n" * 20, encoding="utf-8")
    config, folder, again = VocabularyConfig(sources=(str(source),), size=300), tmp_path / "a", tmp_path / "b"
    train_tokenizer(config, folder)
    train_tokenizer(config, again)
    assert (folder / "tokenizer.json").read_bytes() == (again / "tokenizer.json").read_bytes()
    tokenizer = Tokenizer.load(folder)
    assert 259 < tokenizer.vocab_size <= 300
    assert [tokenizer.id_of(name) for name in SPECIAL] == [0, 1, 2]
    assert tokenizer.eos_ids == (2, 0) and tokenizer.end_of_text == 0
    for text in ("\n        return", "naïve\t数\r\n🙂  x _a__b__ 12345", source.read_text()):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    whole = tokenizer.encode("def f(self):\n        return 1")
    for prompt in ("def f(self):", "def f(self):\n", "def f(self):\n        "):
        assert whole[: len(tokenizer.encode(prompt))] == tokenizer.encode(prompt)  # a prompt may end there
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "A"}]
    ids, mask = ChatTemplate.load(folder).encode_training(tokenizer, messages)
    assert tokenizer.decode([i for i, m in zip(ids, mask) if m], skip_special_tokens=False) == "A<|im_end|>"
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == [2, 0]


def test_vocabulary_settings() -> None:
    with pytest.raises(ConfigError, match="every byte"):
        VocabularyConfig(sources=("x",), size=100)
    with pytest.raises(ConfigError, match="empty"):
        VocabularyConfig(sources=())
