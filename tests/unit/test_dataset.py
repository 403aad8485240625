"""Sources, held-out documents and the tokenised corpus on disk."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.unit import templates
from tests.unit import toy_tokenizers as toys
from twofold.core import ConfigError
from twofold.data import ChatTemplate, Tokenizer, documents, prepare
from twofold.data.dataset import Chat, Completion, Document, Text


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 0]}))
    return toys.save(toys.byte_level(), folder, eos_token="<|im_end|>")


def test_files_folders_and_globs(tmp_path: Path) -> None:
    for name in ("b.txt", "a.md", "sub/c.py", "skip.bin"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert [d.content for d in documents(str(tmp_path))] == [Text("a.md"), Text("b.txt"), Text("sub/c.py")]
    assert [d.content for d in documents(str(tmp_path / "*.bin"))] == [Text("skip.bin")]
    assert [d.content for d in documents(str(tmp_path / "b.txt"))] == [Text("b.txt")]


def test_jsonl(tmp_path: Path) -> None:
    rows = [
        {"text": "t", "id": 7},
        {"prompt": "p", "completion": "c"},
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n\n".join(map(json.dumps, rows)) + "\n")
    found = [d.content for d in documents(str(path))]
    assert found == [Text("t"), Completion("p", "c"), Chat(tuple(rows[2]["messages"]))]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2"),
        ("[1]", "JSON object"),
        ('{"txt": "a"}', "is needed"),
        ('{"text": "a", "messages": []}', "is needed"),
        ('{"text": 1}', "'text' must be a string"),
        ('{"completion": "a"}', "'prompt' must be"),
        ('{"messages": []}', "a list of messages"),
        ('{"messages": [{"content": "x"}]}', "'role' and 'content'"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text('{"text": "fine"}\n' + line)
    with pytest.raises(ConfigError, match=message) as error:
        list(documents(str(path)))
    assert "line 2" in str(error.value)


def test_missing_sources_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="names no files"):
        list(documents(str(tmp_path / "nothing*.txt")))
    with pytest.raises(ConfigError, match="ending in"):
        list(documents(str(tmp_path)))
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(ConfigError, match="byte 3"):
        list(documents(str(tmp_path)))


def test_held_out_is_decided_by_each_document_alone() -> None:
    many = [Document(Text(str(i))) for i in range(4000)]
    held = [d for d in many if d.held_out(0.1)]
    assert 300 < len(held) < 500
    assert all(d.held_out(0.2) for d in held)
    assert not any(d.held_out(0.0) for d in many) and all(d.held_out(1.0) for d in many)
    assert len({Document(Text(str(i)), key="same").held_out(0.5) for i in range(20)}) == 1
    assert not Document(Text("x"), always_train=True).held_out(1.0)


def test_corpus_is_made_once_and_keyed_by_content(tmp_path: Path, tokenizer: Tokenizer) -> None:
    source = tmp_path / "rows.jsonl"
    source.write_text("\n".join(json.dumps({"text": f"hello {i}"}) for i in range(50)))
    made = prepare([str(source)], tokenizer, tmp_path / "cache", valid_fraction=0.2)
    assert len(made.train) + len(made.valid) == 50 and 2 < len(made.valid) < 20
    folders = list((tmp_path / "cache").iterdir())
    stamp = (folders[0] / "train.ids").stat().st_mtime_ns
    again = prepare([str(source)], tokenizer, tmp_path / "cache", valid_fraction=0.2)
    assert again.fingerprint == made.fingerprint and (again.train.ids == made.train.ids).all()
    assert (folders[0] / "train.ids").stat().st_mtime_ns == stamp
    first = made.train.ids[: made.train.starts[1]].tolist()
    assert tokenizer.decode(first, skip_special_tokens=False).startswith("hello ")
    assert tokenizer.decode(first, skip_special_tokens=False).endswith("<|endoftext|>")
    source.write_text('{"text": "other"}')
    other = prepare([str(source)], tokenizer, tmp_path / "cache")
    assert other.fingerprint != made.fingerprint and len(other.train) == 1 and len(other.valid) == 0
    (tmp_path / "cache" / other.fingerprint[:16] / "train.ids").write_bytes(b"1234")
    with pytest.raises(ConfigError, match="damaged"):
        prepare([str(source)], tokenizer, tmp_path / "cache")


def test_what_is_learned(tmp_path: Path, tokenizer: Tokenizer) -> None:
    source = tmp_path / "rows.jsonl"
    chat = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "world"}]
    rows = [{"prompt": "hello ", "completion": "world"}, {"messages": chat}]
    source.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(ConfigError, match="chat template"):
        prepare([str(source)], tokenizer, tmp_path / "cache")
    corpus = prepare([str(source)], tokenizer, tmp_path / "cache", template=ChatTemplate(templates.CHATML)).train
    learned = []
    for first, end in zip(corpus.starts[:-1], corpus.starts[1:]):
        ids = corpus.ids[first:end][corpus.learn[first:end] == 1].tolist()
        learned.append(tokenizer.decode(ids, skip_special_tokens=False))
    assert learned == ["world<|endoftext|>", "world<|im_end|>"]
    assert not list((tmp_path / "cache").glob("*.part"))


def test_a_source_named_twice_is_learned_twice_and_validated_once(tmp_path: Path, tokenizer: Tokenizer) -> None:
    source = tmp_path / "rows.jsonl"
    source.write_text("\n".join(json.dumps({"text": f"hello {i}"}) for i in range(40)))
    once = prepare([str(source)], tokenizer, tmp_path / "cache", valid_fraction=0.2)
    twice = prepare([str(source)] * 2, tokenizer, tmp_path / "cache", valid_fraction=0.2)
    assert len(twice.train) == 2 * len(once.train) and twice.train.tokens == 2 * once.train.tokens
    assert (twice.valid.ids == once.valid.ids).all() and len(once.valid) > 2
    assert twice.fingerprint != once.fingerprint
