"""The tokenizer: round trips, special tokens that text cannot forge, end tokens, damaged folders."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit import toy_tokenizers as toys
from twofold.core import CheckpointError, RequestError
from twofold.data import Tokenizer

CHATML = {"eos_token": "<|im_end|>", "bos_token": None}


@pytest.fixture(scope="module")
def bytelevel(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return toys.save(toys.byte_level(), tmp_path_factory.mktemp("bytes"), **CHATML)


@given(text=st.text())
def test_byte_level_round_trip(bytelevel: Tokenizer, text: str) -> None:
    assert bytelevel.decode(bytelevel.encode(text), skip_special_tokens=False) == text
    assert b"".join(map(bytelevel.token_bytes, bytelevel.encode(text))) == text.encode()


@pytest.mark.parametrize("make", [toys.byte_level, toys.sentencepiece_like, toys.metaspace])
def test_text_cannot_forge_special_tokens(make, tmp_path: Path) -> None:
    tokenizer = toys.save(make(), tmp_path)
    assert tokenizer.special_tokens
    for name, place in tokenizer.special_tokens.items():
        if name == "<unk>":
            continue
        assert place in tokenizer.encode(f"a{name}b", special=True)
        for text in (name, f"a{name}b", f"hello {name} {name}{name}", name * 3):
            ids, spans = tokenizer.encode_spans(text)
            assert not (set(ids) & (tokenizer.special_ids - {tokenizer.id_of("<unk>")})), text
            assert spans == sorted(spans) and all(0 <= a <= b <= len(text) for a, b in spans)


def test_special_tokens_are_found_when_asked(bytelevel: Tokenizer) -> None:
    end = bytelevel.id_of("<|im_end|>")
    assert bytelevel.encode("x<|im_end|>", special=True)[-1] == end
    assert bytelevel.split_special("a<|im_end|>b<|im_start|>") == [(1, 11), (12, 24)]
    assert bytelevel.decode([end]) == "" and bytelevel.decode([end], skip_special_tokens=False) == "<|im_end|>"


def test_ids_beyond_the_vocabulary_are_nothing(bytelevel: Tokenizer) -> None:
    assert bytelevel.decode([10**6, *bytelevel.encode("hi"), -1]) == "hi"
    assert bytelevel.token_bytes(10**6) == b"" and bytelevel.token(10**6) is None


def test_lone_surrogate_is_a_request_error(bytelevel: Tokenizer) -> None:
    with pytest.raises(RequestError, match="surrogate"):
        bytelevel.encode("a\ud800")


def test_end_tokens_of_every_file(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 2]}))
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 1, "bos_token_id": 1}))
    tokenizer = toys.save(toys.byte_level(), tmp_path, eos_token={"content": "<|im_end|>"})
    assert tokenizer.eos_ids == (2, 0) and tokenizer.bos_id == 1
    (tmp_path / "generation_config.json").unlink()
    assert Tokenizer.load(tmp_path).eos_ids == (2, 1)


def test_start_and_end_tokens_follow_the_settings(tmp_path: Path) -> None:
    backend = toys.sentencepiece_like()
    plain = toys.save(backend, tmp_path / "a", bos_token="<s>", eos_token="</s>")
    assert plain.encode_prompt("hello") == plain.encode("hello")
    asked = toys.save(backend, tmp_path / "b", bos_token="<s>", eos_token="</s>", add_bos_token=True)
    assert asked.encode_prompt("hello") == [asked.bos_id, *plain.encode("hello")]
    assert asked.encode("hello") == plain.encode("hello")
    both = toys.save(backend, tmp_path / "c", bos_token="<s>", eos_token="</s>", add_bos_token=True, add_eos_token=True)
    assert both.encode_prompt("hello") == [both.bos_id, *plain.encode("hello"), both.eos_ids[0]]


def test_truncation_in_the_file_is_ignored(tmp_path: Path) -> None:
    backend = toys.byte_level()
    backend.enable_truncation(4)
    backend.enable_padding(length=9)
    assert len(toys.save(backend, tmp_path).encode("a b c d e f g h i j k")) > 9


def test_sentencepiece_bytes(tmp_path: Path) -> None:
    tokenizer = toys.save(toys.sentencepiece_like(), tmp_path)
    ids = tokenizer.encode("hello ü")
    assert b"".join(map(tokenizer.token_bytes, ids)) == " hello ü".encode()
    assert tokenizer.decode(ids) == "hello ü"


def test_old_gpt2_folder(tmp_path: Path) -> None:
    new = toys.save(toys.byte_level(), tmp_path / "new")
    model = json.loads((tmp_path / "new" / "tokenizer.json").read_text())["model"]
    old = tmp_path / "old"
    old.mkdir()
    (old / "vocab.json").write_text(json.dumps(model["vocab"]))
    (old / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(pair) for pair in model["merges"]) + "\n")
    (old / "special_tokens_map.json").write_text(json.dumps({"eos_token": "<|endoftext|>"}))
    tokenizer = Tokenizer.load(old)
    assert tokenizer.eos_ids == (0,)
    for text in toys.TEXT:
        assert tokenizer.encode(text) == new.encode(text)
        assert tokenizer.decode(tokenizer.encode(text)) == text
    (old / "merges.txt").write_text("a b c\n")
    with pytest.raises(CheckpointError, match="two pieces"):
        Tokenizer.load(old)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "no tokenizer.json"),
        ({"tokenizer.model": "x"}, "SentencePiece"),
        ({"tokenizer.json": "{"}, "cannot be read"),
        ({"tokenizer.json": "{}", "tokenizer_config.json": "[1]"}, "JSON object"),
        ({"tokenizer.json": "{}", "tokenizer_config.json": "{"}, "not JSON"),
    ],
)
def test_damaged_folders_are_named(tmp_path: Path, files: dict[str, str], message: str) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(CheckpointError, match=message):
        Tokenizer.load(tmp_path)


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no model folder"):
        Tokenizer.load(tmp_path / "nowhere")
