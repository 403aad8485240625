"""How near does the engine come to what a GPU can do? A 7B LLaMA's shape with random weights, in bf16.

    twofold bench gpu [--quick] [--requests N] [--budget TOKENS] [--turns N] [--json FILE]

    S1   prompts of 2,600 tokens, 60 new ones     mostly matrix products: share of the bf16 product measured here
    S2   prompts of 500, 150 / 500 / 1,024 new    mostly weights and keys read: share of what reading them at the
                                                  measured copy rate, and the prompts' products, would take

All requests of a workload are there at once, greedy, EOS ignored, no prefix caching. The limits are this device's own,
measured in the same run: torch's product of 8192 x 8192 and a copy of 2 GiB, both directions counted. `--quick` is a
smoke test: 4 layers, a quarter of the lengths, 8 requests.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from turns import Ours, Spread
from workload import Workload

from twofold import EngineConfig
from twofold.engine.paged import KVCache
from twofold.models import Decoder, LayerSpec, ModelSpec
from twofold.models.spec import Attention, Gated, Head, Names, Norm, Pre, Rope

NO_DEVICE = "benchmarks/gpu.py measures a CUDA device, and there is none here: run it on a machine that has one"
SHAPE = {"S1": ((2600, 60),), "S2": ((500, 150), (500, 500), (500, 1024))}
TOGETHER = {"S1": 32, "S2": 64}
BLOCK = 16


def llama(layers: int) -> ModelSpec:
    """LLaMA-7B: hidden 4096, 32 heads of 128, feed-forward 11,008, vocabulary 32,000."""
    norm = Norm(kind="rms", eps=1e-6)
    layer = LayerSpec(
        mixer=Attention(heads=32, kv_heads=32, head_dim=128, position=Rope(theta=1e4, dim=128)),
        ffn=Gated(width=11_008, act="silu"),
        norms=Pre(norm=norm),
    )
    return ModelSpec(
        architecture="Llama",
        hidden=4096,
        vocab=32_000,
        layers=(layer,) * layers,
        norm=norm,
        head=Head(tied=False),
        names=Names(table={}),
        max_len=4096,
    )


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a decoder's work takes at least: numbers of its linear layers, and of one token's keys and values."""

    linear: int
    head: int
    attention: int
    kv_bytes: int

    @classmethod
    def of(cls, spec: ModelSpec) -> Cost:
        mixer = spec.layers[0].mixer
        ffn = spec.layers[0].ffn
        assert isinstance(ffn, Gated)
        each = spec.hidden * (2 * mixer.q_width + 2 * mixer.kv_width + 3 * ffn.width)
        return cls(
            linear=len(spec.layers) * each,
            head=spec.hidden * spec.vocab,
            attention=len(spec.layers) * 2 * mixer.q_width,
            kv_bytes=KVCache.bytes_per_block(spec, 1, torch.bfloat16),
        )

    def prompt_flops(self, length: int) -> float:
        """A whole prompt: two operations for each weight and token, its pairs of tokens, and one row of logits."""
        return 2.0 * self.linear * length + 2.0 * self.attention * length * (length + 1) / 2 + 2.0 * self.head

    def decode_flops(self, length: int, new: int) -> float:
        """`new` tokens, one by one, behind `length` others."""
        pairs = new * length + new * (new + 1) / 2
        return 2.0 * (self.linear + self.head) * new + 2.0 * self.attention * pairs

    def decode_bytes(self, length: int, new: int, rows: int) -> float:
        """What `new` steps of `rows` requests read: all weights a step, and every row's keys and values."""
        pairs = new * length + new * (new + 1) / 2
        return 2.0 * (self.linear + self.head) * new + float(rows) * self.kv_bytes * pairs


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What this device does in operations and bytes a second."""

    flops: float
    bytes: float


def seconds(run: Callable[[], object], times: int) -> float:
    """The median time of one run, by the device's own clock."""
    for _ in range(3):
        run()
    marks = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(times)]
    for before, after in marks:
        before.record()
        run()
        after.record()
    torch.cuda.synchronize()
    return statistics.median(before.elapsed_time(after) for before, after in marks) / 1e3


def measure(times: int) -> Limits:
    """This device's limits, on random numbers."""
    a, b = (torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    product = seconds(lambda: a @ b, times)
    source = torch.randint(0, 256, (1 << 30,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    copy = seconds(lambda: target.copy_(source), times)
    return Limits(flops=2.0 * 8192**3 / product, bytes=2.0 * source.numel() / copy)


def random_decoder(spec: ModelSpec) -> Decoder:
    decoder = Decoder(spec, dtype=torch.bfloat16, device="meta").to_empty(device="cuda")
    for parameter in decoder.parameters():
        with torch.no_grad():
            parameter.normal_(0.0, 0.02) if parameter.dim() > 1 else parameter.fill_(1.0)
    return decoder


def floor(cost: Cost, limits: Limits, length: int, new: int, rows: int) -> float:
    """Seconds that reading at the copy's rate and multiplying at the product's rate would take, one after the other.

    A request's first new token comes from its prompt.
    """
    prompts = rows * cost.prompt_flops(length) / limits.flops
    steps = max(
        cost.decode_bytes(length, new - 1, rows) / limits.bytes,
        rows * cost.decode_flops(length, new - 1) / limits.flops,
    )
    return prompts + steps


def run_one(ours: Ours, cost: Cost, limits: Limits, shape: tuple[int, int], rows: int, turns: int) -> dict[str, Any]:
    """One workload: requests a second, and the shares of the device's limits."""
    length, new = shape

    def work(turn: int) -> Workload:
        generator = torch.Generator().manual_seed(turn)
        prompts = torch.randint(0, 32_000, (rows, length), generator=generator).tolist()
        return Workload(prompts=tuple(map(tuple, prompts)), outputs=(new,) * rows)

    ours.run(work(0), 0)  # kernels are built, tiles compared, graphs captured
    took = Spread.of([ours.run(work(turn), turn)[0] for turn in range(1, turns + 1)])
    flops = rows * (cost.prompt_flops(length) + cost.decode_flops(length, new - 1))
    found = {
        "prompt": length,
        "new": new,
        "requests": rows,
        "seconds": took.median,
        "requests_s": rows / took.median,
        "tokens_s": rows * new / took.median,
        "share_of_product": flops / took.median / limits.flops,
        "share_of_floor": floor(cost, limits, length, new, rows) / took.median,
    }
    print(
        f"{length:>5} in {new:>5} out  {rows:>3} requests  {found['requests_s']:7.2f} requests/s  "
        f"{found['tokens_s']:8,.0f} new tokens/s  {found['share_of_product']:4.0%} of the product, "
        f"{found['share_of_floor']:4.0%} of the floor  ({took.text('s', 2)})",
        flush=True,
    )
    return found


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
    parser.add_argument("--quick", action="store_true", help="4 layers, a quarter of the lengths, 8 requests, one turn")
    parser.add_argument("--requests", type=int, help="requests of each workload (default: 32 for S1, 64 for S2)")
    parser.add_argument("--budget", type=int, default=4096, help="tokens of one step at most (default: 4096)")
    parser.add_argument("--turns", type=int, default=3, help="how often each workload runs (default: 3)")
    parser.add_argument("--json", type=Path, help="write the record to this file")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    if not torch.cuda.is_available():
        sys.exit(NO_DEVICE)
    spec = llama(4 if args.quick else 32)
    limits = measure(5 if args.quick else 20)
    name, cost = torch.cuda.get_device_name(), Cost.of(spec)
    print(f"{name}: bf16 product {limits.flops / 1e12:,.0f} TFLOP/s, copy {limits.bytes / 1e9:,.0f} GB/s")
    decoder = random_decoder(spec)
    per_block = KVCache.bytes_per_block(spec, BLOCK, torch.bfloat16)
    blocks = int(torch.cuda.mem_get_info()[0] * 0.8) // per_block
    print(f"LLaMA-7B's shape, {len(spec.layers)} layers; cache of {blocks * BLOCK:,} tokens; {args.budget} a step")
    config = EngineConfig(
        dtype="bfloat16",
        device="cuda",
        max_num_seqs=max(TOGETHER.values()),
        max_num_batched_tokens=args.budget,
        num_blocks=blocks,
        block_size=BLOCK,
        enable_prefix_caching=False,
    )
    started, record = time.perf_counter(), {"device": name, "limits": vars(limits), "quick": args.quick}
    for workload, shapes in SHAPE.items():
        print(workload)
        rows = args.requests or (8 if args.quick else TOGETHER[workload])
        ours = Ours(decoder, replace(config, max_num_seqs=max(rows, config.max_num_seqs)))
        record[workload] = [
            run_one(
                ours, cost, limits, (a // 4, b // 4) if args.quick else (a, b), rows, 1 if args.quick else args.turns
            )
            for a, b in shapes
        ]
        ours.engine.sleep()
    print(f"{time.perf_counter() - started:.0f} s in all")
    if args.json:
        args.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
