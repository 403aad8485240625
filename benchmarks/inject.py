"""What does init_inference give a transformers model? The same model object before and after, in turn.

    twofold bench inject [--threads N] [--turns N] [--quick] [--json FILE]

A Llama and a Qwen3 of random weights (hidden size 512, six layers), fp32: greedy generation of 48 tokens behind 64,
alone and four at once, and one forward pass over 512 tokens; with the same fp32 weights, and with them in int8. Needs
transformers.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import limits
import torch
from turns import Spread, use_threads

from twofold import init_inference
from twofold.platforms import team_size

SHAPE = {
    "vocab_size": 8192,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "max_position_embeddings": 2048,
}
FAMILIES = ("LlamaConfig", "Qwen3Config")


def works(quick: bool) -> dict[str, Callable[[Any], object]]:
    """What each side does, by name."""
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(3, SHAPE["vocab_size"], (4, 512), generator=draw)
    new = 4 if quick else 48

    def generate(rows: int) -> Callable[[Any], object]:
        how = {"max_new_tokens": new, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
        return lambda model: model.generate(ids[:rows, :64], **how)

    def forward(model: Any) -> object:
        with torch.no_grad():
            return model(ids[:1])

    return {"generate, 1 at once": generate(1), "generate, 4 at once": generate(4), "512 tokens in": forward}


def seconds(work: Callable[[Any], object], model: Any) -> float:
    start = time.perf_counter()
    work(model)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
    parser.add_argument("--threads", type=int, default=team_size())
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="one turn, few tokens: a smoke test")
    parser.add_argument("--json", type=Path, help="write the record to this file")
    args = parser.parse_args()
    import transformers

    use_threads(args.threads)
    machine = limits.measure(args.threads, quick=args.quick)
    print(f"transformers {transformers.__version__}, fp32, {args.threads} threads; the model's own attention is sdpa")
    print(limits.line(machine), flush=True)
    record: dict[str, Any] = {"limits": machine, "threads": args.threads, "ratios": {}}
    for family in FAMILIES:
        torch.manual_seed(0)
        theirs = transformers.AutoModelForCausalLM.from_config(getattr(transformers, family)(**SHAPE)).eval()
        for dtype in ("float32", "int8"):
            ours = init_inference(copy.deepcopy(theirs), dtype=dtype)
            print(f"{family.removesuffix('Config')}, {dtype}: before rounding {ours.report.difference:.1e} apart")
            for name, work in works(args.quick).items():
                seconds(work, theirs), seconds(work, ours)
                pairs = [(seconds(work, theirs), seconds(work, ours)) for _ in range(1 if args.quick else args.turns)]
                ratio = Spread.of([a / b for a, b in pairs])
                record["ratios"][f"{family}, {dtype}: {name}"] = ratio.median
                print(f"  {name:<20} {ratio.text('times as fast', 2)}", flush=True)
    if args.json:
        args.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
