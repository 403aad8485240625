"""What does a beam search cost, against transformers' of the same width, and against as many samples of our own?

    twofold bench beams [--model DIR] [--width 4] [--requests 8] [--quick] [--json FILE]

Prompts are cut from the standard library's source; fp32, the same threads, EOS ignored, so that every sequence has one
length. transformers searches in one batch of all prompts (left-padded: they are of one length) and in turn A B A B. Its
best sequences must be ours. Samples are `n` independent ones of each prompt in our engine: they share the prompt's full
blocks, beams also what they have in common behind it. Blocks are the most that were held at once; "apart" is what as
many requests that share nothing would hold.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import random
import sys
import sysconfig
import time
from pathlib import Path
from typing import Any

import limits
from turns import Spread, loaded, same_tokens, use_threads
from workload import Workload

from twofold import Engine, EngineConfig, SamplingParams
from twofold.commands.model import model_dir
from twofold.data import Tokenizer
from twofold.engine.request import Request
from twofold.models import load
from twofold.platforms import team_size


def cut(model: Path, requests: int, prompt: int, new: int, turn: int) -> Workload:
    """So many pieces of `prompt` tokens of source, others in every turn."""
    rng, tokenizer = random.Random(turn), Tokenizer.load(model)
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    found = []
    for path in rng.sample([path for path in files if path.stat().st_size > 12_000], requests):
        ids = tokenizer.encode(path.read_text(encoding="utf-8")[:60_000])
        at = rng.randrange(max(1, len(ids) - prompt))
        found.append(tuple(ids[at : at + prompt]))
    return Workload(prompts=tuple(found), outputs=(new,) * requests)


def run(engine: Engine, work: Workload, name: str, **params: Any) -> tuple[float, list[list[int]], int]:
    """Seconds, the best or first sequence of each prompt, and the most blocks held."""
    how = SamplingParams(max_tokens=work.outputs[0], ignore_eos=True, **params)
    count = 1 if how.use_beam_search else how.n
    began, most = time.perf_counter(), 0
    found: dict[str, list[int]] = {}
    for number, prompt in enumerate(work.prompts):
        for sample in range(count):
            key = f"{name}-{number}-{sample}"
            found[key] = []
            engine.submit(Request(id=key, prompt_ids=prompt, params=how, sample=sample, seed=number))
    while engine.has_work:
        for output in engine.step():
            found[output.request_id] += [token.id for token in (*output.tokens, *_best(output.beams))]
        most = max(most, engine.pool.used)
    return time.perf_counter() - began, list(found.values())[::count], most


def _best(beams: Any) -> Any:
    return beams[0].tokens if beams else ()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
    parser.add_argument("--model", help="checkpoint directory (default: the bundled model)")
    parser.add_argument("--width", type=int, default=4, help="beams, and samples (default: 4)")
    parser.add_argument("--requests", type=int, default=8, help="prompts at once (default: 8)")
    parser.add_argument("--input-len", type=int, default=200)
    parser.add_argument("--output-len", type=int, default=64)
    parser.add_argument("--turns", type=int, default=5, help="how often each side runs (default: 5)")
    parser.add_argument("--threads", type=int, default=team_size(), help="threads of each side")
    parser.add_argument("--quick", action="store_true", help="two prompts, one turn: a smoke test")
    parser.add_argument("--no-peer", action="store_true", help="measure Twofold alone")
    parser.add_argument("--json", type=Path, help="write the record to this file")
    args = parser.parse_args()
    if args.quick:
        args.requests, args.turns, args.output_len = 2, 1, 16
    model = model_dir(args.model)
    use_threads(args.threads)
    record = measure(args, model)
    report(args, record)
    if args.json:
        args.json.write_text(json.dumps(record, indent=1) + "\n")


def measure(args: argparse.Namespace, model: Path) -> dict[str, Any]:
    """All sides in turn; seconds and blocks by side."""
    width = args.width
    config = EngineConfig(dtype="float32", max_num_seqs=max(64, args.requests * width), enable_prefix_caching=True)
    engine = Engine(load(model), config)
    beams: dict[str, Any] = {"use_beam_search": True, "beam_width": width, "temperature": 0.0}
    peer = None
    if not args.no_peer and importlib.util.find_spec("transformers"):
        peer = loaded("transformers_static.py", sys.executable, model, args.threads)
    seconds: dict[str, list[float]] = {"beams": [], "samples": [], "peer": []}
    blocks: dict[str, int] = {"beams": 0, "samples": 0}
    equal = []
    for turn in range(args.turns + 1):  # turn 0 warms up
        work = cut(model, args.requests, args.input_len, args.output_len, turn)
        engine.pool.forget_all()
        took, best, held = run(engine, work, f"b{turn}", **beams)
        engine.pool.forget_all()
        drawn, _, kept = run(engine, work, f"s{turn}", n=width, temperature=1.0)
        answer = peer.ask(work, beams=width, batch=args.requests) if peer else None
        if turn:
            seconds["beams"].append(took)
            seconds["samples"].append(drawn)
            blocks = {"beams": max(blocks["beams"], held), "samples": max(blocks["samples"], kept)}
            if answer:
                seconds["peer"].append(float(answer["seconds"]))
                equal.append(same_tokens(best, answer["tokens"]))
    if peer:
        peer.close()
    apart = args.requests * width * engine.pool.blocks_for(args.input_len + args.output_len - 1)
    return {
        "width": width,
        "requests": args.requests,
        "machine": limits.measure(args.threads, quick=True),
        "seconds": seconds,
        "blocks": blocks | {"apart": apart},
        "same_best": equal,
    }


def report(args: argparse.Namespace, record: dict[str, Any]) -> None:
    seconds, blocks = record["seconds"], record["blocks"]
    shape = f"{args.requests} prompts of {args.input_len} tokens, {args.output_len} new, width {args.width}"
    print(f"{shape}, fp32, {args.threads} threads, {args.turns} turns")
    for side in ("beams", "samples", "peer"):
        if seconds[side]:
            print(f"{side:8} {Spread.of(seconds[side]).text('s', 2)}")
    if seconds["peer"]:
        ratio = Spread.of([b / a for a, b in zip(seconds["beams"], seconds["peer"], strict=True)])
        same = sum(record["same_best"]) / len(record["same_best"])
        print(f"transformers' beams take {ratio.text('times ours', 2)}; {same:.0%} of the best sequences are the same")
    cost = Spread.of([a / b for a, b in zip(seconds["beams"], seconds["samples"], strict=True)])
    print(f"beams take {cost.text('times as long as as many samples', 2)}")
    for side in ("beams", "samples"):
        print(f"{side:8} hold {blocks[side]} blocks at most, {1 - blocks[side] / blocks['apart']:.0%} less than apart")


if __name__ == "__main__":
    main()
