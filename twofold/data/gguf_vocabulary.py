"""The tokenizer that a GGUF file describes, as tokenizer.json and tokenizer_config.json.

    tokenizer.ggml.model   "gpt2"   bytes as printable characters, merges in the file, split by `tokenizer.ggml.pre`
                           "llama"  "▁" for a space and <0x0A> for bytes; merges found again from the tokens' scores

A token is joined from two others; of all ways to do so, merges are those whose whole has the higher score, as
SentencePiece's own merging goes. Types of tokens: 3 control, 4 a user's own, 6 a byte.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

from ..core import CheckpointError, unknown

CONTROL, OWN = 3, 4
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LOWER, _UPPER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]", r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLITS = {
    "gpt-2": _GPT2,
    "default": _GPT2,
    "llama-bpe": _WORDS + r"\p{N}{1,3}" + _REST,
    "llama3": _WORDS + r"\p{N}{1,3}" + _REST,
    "smaug-bpe": _WORDS + r"\p{N}{1,3}" + _REST,
    "qwen2": _WORDS + r"\p{N}" + _REST,
    "deepseek-r1-qwen": _WORDS + r"\p{N}" + _REST,
    "tekken": _TEKKEN,
}
"""How text is cut before merging, by the file's word for it."""
NFC = ("qwen2", "deepseek-r1-qwen")
ROLES = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}


def tokenizer_files(meta: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The files of a model folder: the text of tokenizer.json, and tokenizer_config.json's contents.

    Raises:
        CheckpointError: a vocabulary that Twofold does not build; a tokenizer.json beside the file helps.
    """
    told = {key.removeprefix("tokenizer.ggml."): value for key, value in meta.items() if key.startswith("tokenizer.")}
    kind, tokens = told.get("model"), told.get("tokens")
    if kind not in ("gpt2", "llama"):
        raise CheckpointError(f"{where}: " + unknown("kind of vocabulary", str(kind), ("gpt2", "llama")) + BESIDE)
    if not isinstance(tokens, list) or len(set(tokens)) != len(tokens):
        raise CheckpointError(f"{where}: tokenizer.ggml.tokens is no list of different tokens" + BESIDE)
    backend = _bytes(told, tokens, where) if kind == "gpt2" else _pieces(told, tokens, meta)
    types = told.get("token_type") or []
    for number in (CONTROL, OWN):
        special = number == CONTROL
        added = [AddedToken(t, special=special, normalized=False) for t, its in zip(tokens, types) if its == number]
        backend.add_special_tokens(added) if special else backend.add_tokens(added)
    if backend.get_vocab_size() != len(tokens):
        raise CheckpointError(f"{where}: added tokens that are not in the vocabulary" + BESIDE)
    settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    for role, theirs in ROLES.items():
        place = told.get(f"{theirs}_token_id")
        if isinstance(place, int) and 0 <= place < len(tokens):
            settings[role] = tokens[place]
    begins = told.get("add_bos_token", kind == "llama")
    settings |= {"add_bos_token": bool(begins), "add_eos_token": bool(told.get("add_eos_token", False))}
    if isinstance(meta.get("tokenizer.chat_template"), str):
        settings["chat_template"] = meta["tokenizer.chat_template"]
    return {"tokenizer.json": backend.to_str(pretty=False), "tokenizer_config.json": settings}


BESIDE = "; or put the model's tokenizer.json beside the file"


def _bytes(told: Mapping[str, Any], tokens: Sequence[str], where: str) -> Backend:
    pre = told.get("pre", "default")
    if pre not in SPLITS:
        raise CheckpointError(f"{where}: " + unknown("way to cut text (tokenizer.ggml.pre)", str(pre), SPLITS) + BESIDE)
    merges = told.get("merges")
    if not isinstance(merges, list) or not all(merge.count(" ") == 1 for merge in merges):
        raise CheckpointError(f"{where}: tokenizer.ggml.merges is no list of pairs" + BESIDE)
    left_right = [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)]
    vocab = {token: place for place, token in enumerate(tokens)}
    whole = pre in ("llama-bpe", "llama3", "tekken")  # a word that is a token is not cut, whatever merges say
    backend = Backend(models.BPE(vocab=vocab, merges=left_right, ignore_merges=whole))
    if pre in NFC:
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLITS[pre]), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    return backend


def _pieces(told: Mapping[str, Any], tokens: Sequence[str], meta: Mapping[str, Any]) -> Backend:
    gemma = str(meta.get("general.architecture")).startswith("gemma")
    if gemma:  # runs of spaces are spelled as such there, and looked up as "▁"
        tokens = [token.replace(" ", "▁") if not token.strip() else token for token in tokens]
    scores = told.get("scores") or [0.0] * len(tokens)
    vocab = {token: place for place, token in enumerate(tokens)}
    ranks = {token: (-place if gemma else scores[place]) for token, place in vocab.items()}
    unknown_id = told.get("unknown_token_id", 0)
    model = models.BPE(
        vocab=vocab,
        merges=merges_of(vocab, ranks),
        unk_token=tokens[unknown_id],
        fuse_unk=True,
        byte_fallback=all(f"<0x{byte:02X}>" in vocab for byte in range(256)),
    )
    backend = Backend(model)
    spaces = normalizers.Replace(" ", "▁")
    prefix = bool(told.get("add_space_prefix", not gemma))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces]) if prefix else spaces
    back = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*back, decoders.Strip(" ", 1, 0)] if prefix else back)
    return backend


def merges_of(vocab: Mapping[str, int], ranks: Mapping[str, float]) -> list[tuple[str, str]]:
    """Every way to join two tokens to a third, the highest rank of the third first, then the lower ids of the two."""
    found = []
    for token in vocab:
        ways = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
        joined = [(left, right) for left, right in ways if left in vocab and right in vocab]
        found += [(ranks[token], vocab[left], vocab[right], (left, right)) for left, right in joined]
    return [pair for *_, pair in sorted(found, key=lambda way: (-way[0], way[1], way[2]))]
