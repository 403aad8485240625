"""What does each recomputation policy save, and what does it cost? Counted, not timed.

    twofold bench recompute [--quick] [--json FILE]

One forward and backward pass through the layers of a Llama-shaped decoder for each policy. Held: bytes alive between
the two passes, beside the forecast (`twofold/train/held.py`). Peak: the most bytes alive at once over both, without
the gradients of weights. Both are counted from every tensor that torch makes and lets go. FLOPs: products and
attention, counted from shapes when they run; numbers: what passed once more through norms, activations and turns.
Gradients are compared to the last bit.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from twofold.kernels.flops import count
from twofold.models import Decoder, ModelSpec, spec_from
from twofold.models.packed import PackedContext
from twofold.train.held import gpt_bytes, held_bytes
from twofold.train.init import init_weights
from twofold.train.kept import Disk
from twofold.train.live import Live
from twofold.train.policies import per_layer
from twofold.train.recompute import recompute_layers

POLICIES = ("none", "selective", "attention", "ffn", "every-2", "full")
ON_DISK = ("none", "selective", "full")
MIB = 2**20


def shape(*, quick: bool) -> tuple[ModelSpec, tuple[int, ...]]:
    """A decoder's spec, and the lengths of the sequences it reads."""
    hidden, layers, length = (128, 4, 64) if quick else (512, 8, 512)
    config: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": 8 * hidden // 3 // 64 * 64,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 64,
        "num_key_value_heads": hidden // 64,
        "max_position_embeddings": length,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "vocab_size": 1024,
    }
    return spec_from(config), (length, length)


def measure(
    spec: ModelSpec, lengths: tuple[int, ...], policy: str, folder: Path | None
) -> tuple[dict[str, Any], list[Tensor]]:
    """One policy's record and the gradients; with a folder, what is kept waits in a file there."""
    decoder = Decoder(spec)
    init_weights(decoder, 1)
    disk = Disk(folder) if folder else None
    recompute_layers(decoder, policy, keeper=disk)
    tokens = sum(lengths)
    ids, ctx = torch.arange(tokens) % spec.vocab, PackedContext(lengths)
    weights = list(decoder.parameters())
    with Live([ids, ctx.positions_T, *weights]) as live, count() as work:
        hidden_TD = decoder(ids, ctx)
        held = live.total()
        torch.autograd.backward(hidden_TD, torch.ones_like(hidden_TD))
    outside = 4 * tokens * (2 * spec.hidden + spec.layers[0].mixer.head_dim)  # the last norm, and angles
    grads = [weight.grad for weight in weights if weight.grad is not None]
    record = {
        "policy": policy,
        "kept_on": "disk" if disk else "device",
        "held_bytes": max(0, held - outside),
        "forecast_bytes": 0 if disk else held_bytes(spec, per_layer(policy, len(spec.layers)), tokens),
        "peak_bytes": live.peak(grads),
        "file_bytes": disk.size if disk else 0,
        "flops": work.flops,
        "flops_again": work.again,
        "numbers_again": work.numbers_again,
    }
    return record, grads


def every(spec: ModelSpec, lengths: tuple[int, ...]) -> list[dict[str, Any]]:
    """All policies with activations where they are made, some with activations on disk."""
    records: list[dict[str, Any]] = []
    expected: list[Tensor] = []
    with tempfile.TemporaryDirectory() as folder:
        places = [(policy, None) for policy in POLICIES] + [(policy, Path(folder)) for policy in ON_DISK]
        for policy, place in places:
            record, grads = measure(spec, lengths, policy, place)
            expected = expected or grads
            record["same_gradients"] = all(torch.equal(a, b) for a, b in zip(grads, expected, strict=True))
            records.append(record)
    return records


def report(records: list[dict[str, Any]]) -> None:
    print("policy     kept on  held MiB  forecast  of none  peak MiB  GFLOP     extra  numbers again")
    none = records[0]
    for r in records:
        forecast = f"{r['forecast_bytes'] / MIB:.2f}" if r["forecast_bytes"] else ""
        extra = r["flops_again"] / (r["flops"] - r["flops_again"])
        print(
            f"{r['policy']:<10} {r['kept_on']:<7} {r['held_bytes'] / MIB:>9.2f} {forecast:>9} "
            f"{r['held_bytes'] / none['held_bytes']:>8.1%} {r['peak_bytes'] / MIB:>9.2f} {r['flops'] / 1e9:>6.2f} "
            f"{extra:>9.1%} {r['numbers_again'] / 1e6:>13.2f}M"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
    parser.add_argument("--quick", action="store_true", help="a small shape: seconds")
    parser.add_argument("--json", type=Path, help="write the record to this file")
    args = parser.parse_args()
    spec, lengths = shape(quick=args.quick)
    mixer = spec.layers[0].mixer
    print(
        f"{len(spec.layers)} layers of {spec.hidden}, {mixer.heads} heads, {len(lengths)} sequences of {lengths[0]}; "
        "fp32, one forward and backward pass through the layers\n"
    )
    records = every(spec, lengths)
    report(records)
    same = all(record["same_gradients"] for record in records)
    print(f"\ngradients of all policies: {'the same bits' if same else 'DIFFERENT'}")
    theirs = [len(lengths) * gpt_bytes(spec.hidden, mixer.heads, lengths[0], selective=lean) for lean in (False, True)]
    ours = records[0]["held_bytes"] / len(spec.layers)
    print(
        f"a layer: ours {ours / MIB:.2f} MiB in fp32; a GPT layer of this width by Korthikanti et al. 2022, fp16 with "
        f"dropout, {theirs[0] / MIB:.2f}, without scores {theirs[1] / MIB:.2f}"
    )
    if args.json:
        args.json.write_text(json.dumps(records, indent=1) + "\n")


if __name__ == "__main__":
    main()
