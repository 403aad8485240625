"""Makes the models that benchmarks run: the shape of a real one, random weights, a tokenizer of the full vocabulary.

    python benchmarks/model.py [reference | quick ...] [--models DIR]

Speed does not depend on what a model has learned, so nothing is fetched: `reference` is Qwen3-0.6B's shape, `quick` a
small relative for smoke tests. Written once, as bf16 safetensors, the head tied to the embedding; every peer converts
from the same directory.
"""

from __future__ import annotations

import argparse
import json
import string
from pathlib import Path
from typing import Any

import torch

from twofold.models import Decoder, ModelSpec, save, spec_from
from twofold.train.init import init_weights

PLACE = Path("~/.cache/twofold/bench")
END = "<|endoftext|>"
DONE = ".complete"

LOUD = {"out.weight": 16.0, "down.weight": 64.0, "q_norm.weight": 2.0, "k_norm.weight": 2.0}
"""Fresh weights repeat their last token for ever; with these made larger each token depends on all before, so that two
engines which find the same tokens have computed the same model."""

_COMMON: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_act": "silu",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "rope_scaling": None,
    "sliding_window": None,
    "use_sliding_window": False,
    "initializer_range": 0.02,
    "max_position_embeddings": 4096,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "tie_word_embeddings": True,
    "use_cache": True,
}
MODELS: dict[str, dict[str, Any]] = {
    "reference": _COMMON
    | {
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151_936,
    },
    "quick": _COMMON
    | {
        "hidden_size": 512,
        "intermediate_size": 1536,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "vocab_size": 32_768,
    },
}


def make(name: str, models: Path) -> Path:
    """The directory of a model, written first when it is not there whole."""
    folder, config = models.expanduser() / name, MODELS[name]
    recipe = json.dumps([config, LOUD])
    if (folder / DONE).is_file() and (folder / DONE).read_text() == recipe:
        return folder
    decoder = Decoder(spec_from(config), dtype=torch.bfloat16)
    init_weights(decoder, seed=0)
    with torch.no_grad():
        for parameter_name, parameter in decoder.named_parameters():
            for ending, gain in LOUD.items():
                if parameter_name.endswith(ending):
                    parameter.mul_(gain)
    (folder / DONE).unlink(missing_ok=True)
    save(decoder, folder, config=config)
    _write(folder / "tokenizer.json", tokenizer(config["vocab_size"]))
    _write(
        folder / "tokenizer_config.json",
        {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END, "pad_token": END, "model_max_length": 4096},
    )
    _write(folder / "generation_config.json", {"bos_token_id": 0, "eos_token_id": 0, "do_sample": False})
    (folder / DONE).write_text(recipe)
    return folder


def tokenizer(vocab: int) -> dict[str, Any]:
    """A tokenizer.json: bytes, pairs of small letters, and names that no text reaches up to the full vocabulary."""
    letters = string.ascii_lowercase
    merges = [f"{a} {b}" for a in letters for b in letters]
    tokens = [END, *byte_characters(), *(merge.replace(" ", "") for merge in merges)]
    tokens += [f"[unused{place}]" for place in range(len(tokens), vocab)]
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": 0, "content": END, **special}],
        "normalizer": None,
        "pre_tokenizer": level,
        "post_processor": None,
        "decoder": level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: place for place, token in enumerate(tokens)},
            "merges": merges,
        },
    }


def byte_characters() -> list[str]:
    """The visible character that byte-level vocabularies write for each of the 256 bytes (GPT-2's alphabet)."""
    plain = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = iter(range(256, 512))
    return [chr(byte if byte in plain else next(hidden)) for byte in range(256)]


def body_weights(spec: ModelSpec) -> int:
    """Numbers in the layers' matrices: each is read once for every decoded step, and multiplied once for each token."""
    decoder = Decoder(spec, dtype=torch.bfloat16, device="meta")
    return sum(p.numel() for p in decoder.layers.parameters() if p.dim() > 1)


def head_weights(spec: ModelSpec) -> int:
    """Numbers in the head's matrix, tied or not."""
    return spec.vocab * spec.hidden


def _write(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
    parser.add_argument("names", nargs="*", help=f"which: {', '.join(MODELS)} (default: all)")
    parser.add_argument("--models", type=Path, default=PLACE, help=f"where they are kept (default: {PLACE})")
    args = parser.parse_args()
    if unknown := sorted(set(args.names) - set(MODELS)):
        parser.error(f"no model {', '.join(unknown)}; there are {', '.join(MODELS)}")
    for name in args.names or MODELS:
        folder = make(name, args.models)
        spec = spec_from(MODELS[name])
        print(
            f"{folder}: {body_weights(spec) / 1e6:.0f} M weights in the layers, {head_weights(spec) / 1e6:.0f} M head"
        )


if __name__ == "__main__":
    main()
