"""Requests a second on the two scenarios of "Notes on vLLM v.s. DeepSpeed-FastGen" (2023), all submitted at once.

    twofold bench scenarios [--model DIR] [--requests N] [--turns N] [--quick] [--json FILE] [--no-peer]

Long prompts with short answers (2,600 in; 60, 128 or 200 out) and the rest (500 in; 150, 500 or 1,024 out), shrunk to
the model's context where they do not fit, as is told. Fresh random tokens, no prefix cache (the note's prompts were all
alike, and its engines had none), EOS ignored. Beside requests a second stands what they are of this machine's own
limit, torch's matrix product, and the ratio over transformers' static batches, in turn.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

import limits
from throughput import peer_python
from traffic import SCENARIOS, Pair
from turns import Ours, Runner, Spread, loaded, use_threads
from workload import Workload, draw

from twofold import EngineConfig
from twofold.commands.model import model_dir
from twofold.models import Decoder, load
from twofold.platforms import team_size


def work_of(pair: Pair, requests: int, context: int, vocab: int, turn: int) -> Workload:
    """`requests` of one length, shrunk to `context`."""
    shrink = min(1.0, (context - 1) / sum(pair))
    tokens_in, tokens_out = (max(2, int(length * shrink)) for length in pair)
    rng = random.Random(f"{pair} {turn}")
    return Workload(
        prompts=tuple(draw(rng, tokens_in, vocab) for _ in range(requests)),
        outputs=(tokens_out,) * requests,
        scaled="not scaled" if shrink == 1.0 else f"lengths times {shrink:.2f}",
    )


def shares(decoder: Decoder, work: Workload, seconds: float, machine: dict[str, Any]) -> dict[str, float]:
    """What a run had of the machine's matrix product, attention not counted: two operations a weight and token."""
    weights = sum(p.numel() for p in decoder.layers.parameters())
    flop = 2 * weights * (work.tokens_in + work.tokens_out)
    return {"matmul_share": flop / seconds / 1e9 / machine["matmul_fp32_gflop_s"]}


def one(ours: Ours, peer: Runner | None, pair: Pair, args: argparse.Namespace) -> dict[str, Any]:
    """A scenario's row: requests a second of both sides, turn by turn."""
    decoder = ours.engine.decoder

    def work(turn: int) -> Workload:
        return work_of(pair, args.requests, decoder.max_len, decoder.spec.vocab, turn)

    mine, theirs = [], []
    ours.run(work(0).to_warm_up(), 0)
    for turn in range(1, args.turns + 1):
        mine.append(ours.run(work(turn), turn)[0])
        if peer:
            theirs.append(float(peer.ask(work(turn), batch=args.batch, order="arrival")["seconds"]))
    rate = Spread.of([args.requests / seconds for seconds in mine])
    shape = work(0)
    row: dict[str, Any] = {
        "scaled": shape.scaled,
        "tokens": [len(shape.prompts[0]), shape.outputs[0]],
        "requests_s": rate.median,
        "tokens_s": rate.median * sum((len(shape.prompts[0]), shape.outputs[0])),
    } | shares(decoder, shape, args.requests / rate.median, args.machine)
    line = f"{pair[0]:>5}/{pair[1]:<5}{rate.text('requests/s', 2)}, {row['tokens_s']:,.0f} tokens/s, "
    line += f"products at {row['matmul_share']:.0%}; {shape.scaled}"
    if theirs:
        ratio = Spread.of([b / a for a, b in zip(mine, theirs, strict=True)])
        row["ratio"] = ratio.median
        line += f"; {ratio.text('times transformers', 2)}"
    print(line, flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
    parser.add_argument("--model", help="checkpoint directory (default: the bundled model)")
    parser.add_argument("--scenario", choices=[*SCENARIOS, "all"], default="all")
    parser.add_argument("--requests", type=int, default=32, help="requests of each row (default: 32; the note: 1,000)")
    parser.add_argument("--batch", type=int, default=16, help="the peer's batch (default: 16)")
    parser.add_argument("--threads", type=int, default=team_size())
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="4 requests, one turn: a smoke test")
    parser.add_argument("--json", type=Path, help="write the record to this file")
    parser.add_argument("--peer-python", help="python that has transformers (default: this one, when it has)")
    parser.add_argument("--no-peer", action="store_true", help="measure Twofold alone")
    args = parser.parse_args()
    if args.quick:
        args.requests, args.turns = 4, 1
    model = model_dir(args.model)
    use_threads(args.threads)
    args.machine = limits.measure(args.threads, quick=args.quick)
    ours = Ours(load(model), EngineConfig(dtype="float32", enable_prefix_caching=False))
    print(f"{model}: {ours.engine.decoder.spec.architecture}, fp32, {args.threads} threads, {args.requests} at once")
    print(limits.line(args.machine), flush=True)
    python = peer_python(args)
    peer = loaded("transformers_static.py", python, model, args.threads) if python else None
    record: dict[str, Any] = {"model": model.name, "limits": args.machine, "threads": args.threads, "rows": {}}
    for name, pairs in SCENARIOS.items():
        if args.scenario in (name, "all"):
            for pair in pairs:
                record["rows"][f"{pair[0]}/{pair[1]}"] = one(ours, peer, pair, args)
    if peer:
        peer.close()
    if args.json:
        args.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
