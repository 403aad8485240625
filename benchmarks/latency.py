"""How long until the first token, and how long between tokens, for one request and for many at once?

    twofold bench latency [--model DIR] [--quick] [--json FILE]
    twofold bench latency --batch-size 8 --input-len 32 --output-len 128     a batch of one shape, as vLLM's has

One request alone: prompt 32, 128 new tokens (A), and one long prompt (B). Then 4 and 16 requests at once. Greedy, fp32,
EOS ignored. A's rate is compared with what reading the weights once a token allows, B's with torch's own matrix
product.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from pathlib import Path
from typing import Any

import limits
from turns import use_threads

from twofold import Engine, EngineConfig, SamplingParams
from twofold.commands.model import model_dir
from twofold.engine.capacity import weight_bytes
from twofold.engine.request import Request
from twofold.models import ModelSpec, load, read_spec
from twofold.platforms import team_size


def one_run(engine: Engine, name: str, prompts: list[tuple[int, ...]], new: int) -> dict[str, list[float]]:
    """Seconds to the first token of each request, and between its later ones, all submitted at once."""
    params = SamplingParams(temperature=0.0, max_tokens=new, ignore_eos=True)
    start = time.perf_counter()
    last: dict[str, float] = {}
    first, between = [], []
    for i, prompt in enumerate(prompts):
        engine.submit(Request(id=f"{name}-{i}", prompt_ids=prompt, params=params))
    while engine.has_work:
        outputs = engine.step()
        now = time.perf_counter()
        for output in outputs:
            if not output.tokens:
                continue
            if output.request_id in last:
                between.append((now - last[output.request_id]) / len(output.tokens))
            else:
                first.append(now - start)
            last[output.request_id] = now
    return {"first": first, "between": between}


def percentile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def cell(engine: Engine, spec: ModelSpec, name: str, shape: tuple[int, int, int], turns: int) -> dict[str, Any]:
    """Median and 95th percentile, in milliseconds, over some turns of (requests, prompt, new) with fresh tokens."""
    requests, prompt, new = shape
    tokens = random.Random(name)
    seen: dict[str, list[float]] = {"first": [], "between": []}
    for turn in range(turns + 1):
        prompts = [tuple(tokens.randrange(spec.vocab) for _ in range(prompt)) for _ in range(requests)]
        for key, values in one_run(engine, f"{name}{turn}", prompts, new).items():
            seen[key] += values if turn else []  # turn 0 warms up
    found: dict[str, Any] = {"requests": requests, "prompt": prompt, "new": new}
    for key, values in seen.items():
        if values:
            found[f"{key}_ms"] = 1e3 * statistics.median(values)
            found[f"{key}_p95_ms"] = 1e3 * percentile(values, 0.95)
    return found


def batch(engine: Engine, spec: ModelSpec, args: argparse.Namespace) -> dict[str, float]:
    """Seconds from the start to the end of a whole batch: mean and percentiles, after warming up."""
    tokens = random.Random(0)
    took = []
    warm_up = 1 if args.quick else 10
    for turn in range(warm_up + (2 if args.quick else args.num_iters)):
        prompts = [tuple(tokens.randrange(spec.vocab) for _ in range(args.input_len)) for _ in range(args.batch_size)]
        start = time.perf_counter()
        one_run(engine, f"batch{turn}", prompts, args.output_len)
        took.append(time.perf_counter() - start)
    timed = took[warm_up:]
    found = {"mean": statistics.fmean(timed)}
    found |= {f"p{share:g}": percentile(timed, share / 100) for share in (10, 25, 50, 75, 90, 99)}
    shape = f"{args.batch_size} at once, {args.input_len} in, {args.output_len} out"
    print(f"{shape}: " + ", ".join(f"{name} {value:.4f} s" for name, value in found.items()))
    return found


def told(name: str, found: dict[str, Any]) -> str:
    text = f"{name}  {found['requests']:>3} at once, {found['prompt']:>4} in, {found['new']:>3} out: "
    text += f"first token {found['first_ms']:,.1f} ms (p95 {found['first_p95_ms']:,.1f})"
    if "between_ms" in found:
        text += f", then {found['between_ms']:.2f} ms a token (p95 {found['between_p95_ms']:.2f})"
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
    parser.add_argument("--model", help="checkpoint directory (default: the bundled model)")
    parser.add_argument("--threads", type=int, default=team_size(), help="threads (default: as the server)")
    parser.add_argument("--turns", type=int, default=3, help="how often each cell runs (default: 3)")
    parser.add_argument("--quick", action="store_true", help="one turn, short outputs: a smoke test")
    parser.add_argument("--json", type=Path, help="write the record to this file")
    parser.add_argument("--batch-size", type=int, help="time this many requests of one shape instead, start to end")
    parser.add_argument("--input-len", type=int, default=32, help="with --batch-size: tokens of a prompt (default: 32)")
    parser.add_argument("--output-len", type=int, default=128, help="with --batch-size: new tokens (default: 128)")
    parser.add_argument("--num-iters", type=int, default=30, help="with --batch-size: how often (default: 30)")
    args = parser.parse_args()
    model = model_dir(args.model)
    spec = read_spec(model)
    use_threads(args.threads)
    machine = limits.measure(args.threads, quick=args.quick)
    print(f"{model}: {spec.architecture}, fp32, {args.threads} threads")
    print(limits.line(machine), flush=True)
    decoder = load(model)
    engine = Engine(decoder, EngineConfig(dtype="float32", enable_prefix_caching=False), eos_ids=())
    new, turns = (16, 1) if args.quick else (min(128, spec.max_len - 32), args.turns)
    long = min(1024, spec.max_len - 1)
    shapes = {"A": (1, 32, new), "B": (1, long, 1), "4": (4, 64, new // 2), "16": (16, 64, new // 2)}
    record: dict[str, Any] = {"model": model.name, "limits": machine}
    if args.batch_size:
        record["batch"] = batch(engine, spec, args)
        if args.json:
            args.json.write_text(json.dumps(record, indent=1) + "\n")
        return
    for name, shape in shapes.items():
        record[name] = cell(engine, spec, name, shape, turns)
        print(told(name, record[name]), flush=True)
    bytes_read = weight_bytes(spec, decoder.dtype)
    record["A"]["bandwidth_share"] = bytes_read / (record["A"]["between_ms"] / 1e3) / 1e9 / machine["read_gb_s"]
    flop = 2 * sum(p.numel() for p in decoder.layers.parameters()) * long
    record["B"]["matmul_share"] = flop / (record["B"]["first_ms"] / 1e3) / 1e9 / machine["matmul_fp32_gflop_s"]
    print(f"A reads its weights at {record['A']['bandwidth_share']:.0%} of the measured bandwidth")
    print(f"B multiplies at {record['B']['matmul_share']:.0%} of torch's own matrix product")
    if args.json:
        args.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
