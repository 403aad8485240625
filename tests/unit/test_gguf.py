"""GGUF files: every weight bit-equal to gguf's own reader, settings and tokenizers found again, damage refused."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path

import gguf
import pytest
import torch
from gguf_files import CONFIGS, HALVES, vocabulary, write
from safetensors.torch import save_file
from test_foreign_checkpoints import logits, weights_of
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from twofold.commands.model import model_dir
from twofold.core import CheckpointError
from twofold.data import Tokenizer
from twofold.engine.capacity import weight_bytes
from twofold.models import load, read_formats, read_spec, spec_from
from twofold.models.gguf import GgufFile, unfolded
from twofold.quant.blocks import KINDS

EVERY = [*KINDS, "F32", "F16", "BF16"]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TWOFOLD_CACHE", str(tmp_path / "cache"))


def assert_means(file: Path, meant: dict[str, torch.Tensor], arch: str) -> None:
    folder = unfolded(file)
    decoder = load(folder)
    for name, weight in weights_of(decoder).items():
        found, wanted = weight.float().contiguous().view(torch.int32), meant[name].float().view(torch.int32)
        assert torch.equal(found, wanted), name
    floats = file.parent / "meant"
    floats.mkdir()
    (floats / "config.json").write_text(json.dumps(CONFIGS[arch]))
    save_file({name: tensor.contiguous() for name, tensor in meant.items()}, floats / "model.safetensors")
    assert read_spec(folder) == spec_from(CONFIGS[arch])
    torch.testing.assert_close(logits(decoder), logits(load(floats)), atol=2e-4, rtol=1e-4)
    held = sum(t.numel() * t.element_size() for t in (*decoder.parameters(), *decoder.buffers()))
    assert weight_bytes(read_spec(folder), torch.float32, read_formats(folder)) == held


@pytest.mark.parametrize("kind", EVERY)
def test_every_kind_of_block(kind: str, tmp_path: Path) -> None:
    assert_means(tmp_path / "m.gguf", write("llama", tmp_path / "m.gguf", kind), "llama")


@pytest.mark.parametrize("arch", [arch for arch in CONFIGS if arch != "llama"])
def test_every_architecture(arch: str, tmp_path: Path) -> None:
    assert_means(tmp_path / "m.gguf", write(arch, tmp_path / "m.gguf", "Q8_0"), arch)


MIXES = {
    "Q4_K_M": {"attn_q": "Q4_K", "attn_k": "Q4_K", "attn_v": "Q6_K", "ffn_gate": "Q4_K", "ffn_up": "Q4_K"},
    "Q3_K_M": {"attn_q": "Q3_K", "attn_k": "Q3_K", "attn_v": "Q5_K", "ffn_down": "Q4_K", "output": "Q6_K"},
    "Q4_0 and Q4_1": {"attn_q": "Q4_0", "attn_k": "Q4_1", "attn_v": "Q8_0", "token_embd": "Q6_K"},
}


@pytest.mark.parametrize("name", MIXES)
def test_kinds_that_are_multiplied_as_one(name: str, tmp_path: Path) -> None:
    assert_means(tmp_path / "m.gguf", write("llama", tmp_path / "m.gguf", MIXES[name]), "llama")


def test_an_embedding_that_is_the_head(tmp_path: Path) -> None:
    kinds = {"token_embd": "Q6_K", "ffn_gate": "Q4_K", "ffn_up": "Q4_K"}
    assert_means(tmp_path / "m.gguf", write("qwen3", tmp_path / "m.gguf", kinds), "qwen3")


def test_blocks_of_gguf_are_all_known() -> None:
    for name, kind in KINDS.items():
        assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]] == (kind.inputs, kind.bytes)
    assert set(HALVES) < set(KINDS)


# ------------------------------------------------------------------------------------------------ tokenizers
TEXTS = ["hello world", "  two  spaces\n\n\tand tabs", "naïve café — 12345 ½", "日本語 🙂", "it's I'LL don't", "", " x"]


def test_a_byte_level_vocabulary(tmp_path: Path) -> None:
    for pre, split in (("qwen2", r"\p{N}"), ("llama-bpe", r"\p{N}{1,3}")):
        backend = Backend(models.BPE(ignore_merges=pre == "llama-bpe"))
        backend.normalizer = normalizers.NFC() if pre == "qwen2" else None
        words = rf"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{split}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*"
        cut = pre_tokenizers.Split(__import__("tokenizers").Regex(words + r"|\s*[\r\n]+|\s+(?!\S)|\s+"), "isolated")
        backend.pre_tokenizer = pre_tokenizers.Sequence([cut, pre_tokenizers.ByteLevel(False, use_regex=False)])
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=["<|end|>"]
        )
        backend.train_from_iterator(TEXTS * 4, trainer)
        told = json.loads(backend.to_str())["model"]
        tokens = sorted(told["vocab"], key=told["vocab"].__getitem__)
        table = vocabulary() | {
            "tokenizer.ggml.pre": pre,
            "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.merges": [" ".join(pair) for pair in told["merges"]],
            "tokenizer.ggml.token_type": [3 if token == "<|end|>" else 1 for token in tokens],
            "tokenizer.ggml.eos_token_id": tokens.index("<|end|>"),
        }
        file = tmp_path / f"{pre}.gguf"
        write("llama", file, "Q8_0", table)
        found = Tokenizer.load(unfolded(file))
        for text in TEXTS:
            assert found.encode(text) == backend.encode(text).ids, (pre, text)
            assert found.decode(found.encode(text)) == backend.decode(backend.encode(text).ids)
        assert found.eos_ids == (tokens.index("<|end|>"),)


def test_a_vocabulary_of_pieces(tmp_path: Path) -> None:
    """Merges are found again from scores alone."""
    backend = Backend(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    back = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(back)
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    backend.train_from_iterator(
        [text for text in TEXTS if text] * 4, trainers.BpeTrainer(vocab_size=360, special_tokens=special)
    )
    plain = Backend.from_str(json.dumps(json.loads(backend.to_str()) | {"added_tokens": []}))
    told = json.loads(plain.to_str())["model"]
    tokens = sorted(told["vocab"], key=told["vocab"].__getitem__)
    ranks = {"".join(pair): -float(place) for place, pair in reversed(list(enumerate(told["merges"])))}
    table = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [ranks.get(token, -1e6) for token in tokens],
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * (len(tokens) - 259),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }
    write("llama", tmp_path / "m.gguf", "Q8_0", table)
    found = Tokenizer.load(unfolded(tmp_path / "m.gguf"))
    for text in TEXTS:
        assert found.encode(text) == plain.encode(text).ids, text
        assert found.encode_prompt(text) == [1, *plain.encode(text).ids]
    assert found.bos_id == 1 and found.eos_ids == (2,)


def test_a_tokenizer_beside_the_file_wins(tmp_path: Path) -> None:
    write("llama", tmp_path / "m.gguf", "Q8_0", {"tokenizer.ggml.model": "bert", "tokenizer.ggml.tokens": ["a"]})
    with pytest.raises(CheckpointError, match=r"put the model's tokenizer\.json beside the file"):
        unfolded(tmp_path / "m.gguf")
    Backend(models.WordLevel({"hello": 7, "<unk>": 0}, unk_token="<unk>")).save(str(tmp_path / "tokenizer.json"))
    assert Tokenizer.load(unfolded(tmp_path / "m.gguf")).encode("hello") == [7]


# ------------------------------------------------------------------------------------------------ the folder
def test_commands_take_the_file(tmp_path: Path) -> None:
    write("qwen2", tmp_path / "m.gguf", "Q4_0")
    folder = model_dir(str(tmp_path / "m.gguf"))
    assert model_dir(str(tmp_path / "m.gguf")) == folder and load(folder).spec == spec_from(CONFIGS["qwen2"])
    write("qwen2", tmp_path / "m.gguf", "Q8_0")
    assert model_dir(str(tmp_path / "m.gguf")) != folder
    config = json.loads((folder / "config.json").read_text())
    assert config["dtype"] == "float32" and config["eos_token_id"] == 33
    assert "messages" in json.loads((folder / "tokenizer_config.json").read_text())["chat_template"]


# ------------------------------------------------------------------------------------------------ damage
def cut_short(raw: bytes) -> bytes:
    return raw[: len(raw) - 64]


def renamed(raw: bytes) -> bytes:
    return raw.replace(b"blk.0.attn_output.weight", b"blk.0.attn_outpuz.weight")


def unread(raw: bytes) -> bytes:
    return raw.replace(b"llama.vocab_size", b"llama.vocab_sise")


def another(raw: bytes) -> bytes:
    return raw.replace(b"rope.freq_base", b"rope.freq_base")[:4] + struct.pack("<I", 9) + raw[8:]


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (cut_short, "ends behind the file"),
        (renamed, r"left-over tensor 'blk\.0\.attn_outpuz\.weight'"),
        (unread, r"nothing reads llama\.vocab_sise"),
        (another, "GGUF version 9"),
        (lambda raw: b"GGML" + raw[4:], "no GGUF file"),
        (lambda raw: raw[:40], "damaged"),
        (lambda raw: raw[:8] + b"\xff" * 16 + raw[24:], "damaged"),
    ],
)
def test_a_damaged_file_is_refused(edit: Callable[[bytes], bytes], says: str, tmp_path: Path) -> None:
    file = tmp_path / "m.gguf"
    write("llama", file, "Q8_0")
    file.write_bytes(edit(file.read_bytes()))
    with pytest.raises(CheckpointError, match=says):
        load(unfolded(file))


def test_no_cut_of_a_file_does_worse_than_say_so(tmp_path: Path) -> None:
    file = tmp_path / "m.gguf"
    write("llama", file, "Q8_0")
    raw = file.read_bytes()
    for length in range(0, 4000, 97):
        (tmp_path / "cut.gguf").write_bytes(raw[:length])
        with pytest.raises(CheckpointError):
            GgufFile(tmp_path / "cut.gguf")
