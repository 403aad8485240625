"""Writes a checkpoint's GGUF file for llama.cpp: as it is, widened to fp32, or quantized by llama.cpp itself.

    python benchmarks/peers/make_gguf.py --model DIR --into DIR --format f32|bf16|q8_0|q4_0

Reads bf16 safetensors with numpy alone. q4_0 is "pure": every matrix, the table and head too, unlike llama.cpp's own
mix that leaves the head in six bits, so that a token costs the bytes that the name says. Needs llama-cpp-python, gguf.
"""

from __future__ import annotations

import argparse
import ctypes
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np

PARTS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
QUANTIZED = {"q8_0": 7, "q4_0": 2}  # llama.cpp's numbers of its file types


def renamed(name: str) -> str:
    """What GGUF calls a tensor of Qwen3."""
    name = name.removeprefix("model.").removesuffix(".weight")
    if name in ("embed_tokens", "norm"):
        return {"embed_tokens": "token_embd.weight", "norm": "output_norm.weight"}[name]
    _, layer, part = name.split(".", 2)
    return f"blk.{layer}.{PARTS[part]}.weight"


def tensors(path: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Name and raw bf16 (as uint16) of each tensor of a safetensors file."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    for name, entry in header.items():
        if entry["dtype"] != "BF16":
            raise SystemExit(f"{path}: '{name}' is {entry['dtype']}, and only BF16 is read here")
        begin, end = entry["data_offsets"]
        raw = np.memmap(path, np.uint16, "r", 8 + length + begin, ((end - begin) // 2,))
        yield name, raw.reshape(entry["shape"])


def widened(raw: np.ndarray) -> np.ndarray:
    return (raw.astype(np.uint32) << 16).view(np.float32)


def write(model: Path, out: Path, kind: str) -> None:
    """The GGUF file of a checkpoint; one-dimensional tensors are always fp32, as llama.cpp wants them."""
    config = json.loads((model / "config.json").read_text())
    writer = gguf.GGUFWriter(str(out), "qwen3")
    describe(writer, config, kind)
    vocabulary(writer, json.loads((model / "tokenizer.json").read_text())["model"])
    for name, raw in tensors(model / "model.safetensors"):
        if kind == "f32" or raw.ndim == 1:
            writer.add_tensor(renamed(name), widened(raw))
        else:
            bytes_of = np.ascontiguousarray(raw).view(np.uint8)
            writer.add_tensor(renamed(name), bytes_of, raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def describe(writer: Any, config: dict[str, Any], kind: str) -> None:
    writer.add_name("benchmark")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_file_type({"f32": 0, "bf16": 32}[kind])


def vocabulary(writer: Any, bpe: dict[str, Any]) -> None:
    tokens = sorted(bpe["vocab"], key=bpe["vocab"].__getitem__)
    control, unused, normal = 3, 5, 1
    kinds = [control] + [unused if token.startswith("[unused") else normal for token in tokens[1:]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(bpe["merges"])
    writer.add_eos_token_id(0)
    writer.add_bos_token_id(0)
    writer.add_add_bos_token(False)


def quantize(source: Path, out: Path, kind: str) -> None:
    import llama_cpp.llama_cpp as llama

    llama.llama_backend_init()
    settings = llama.llama_model_quantize_default_params()
    settings.ftype, settings.pure, settings.nthread = QUANTIZED[kind], True, 2
    if code := llama.llama_model_quantize(str(source).encode(), str(out).encode(), ctypes.byref(settings)):
        raise SystemExit(f"llama_model_quantize failed with {code}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--into", type=Path, required=True)
    parser.add_argument("--format", choices=("f32", "bf16", *QUANTIZED), required=True)
    args = parser.parse_args()
    out = args.into / "model.gguf"
    if args.format not in QUANTIZED:
        return write(args.model, out, args.format)
    whole = args.into / "whole.gguf"
    write(args.model, whole, "f32")
    quantize(whole, out, args.format)
    return whole.unlink()


if __name__ == "__main__":
    main()
