"""How many tokens a second on the mixed workload, against transformers' static batching of the same checkpoint?

    twofold bench throughput [--model DIR] [--requests N] [--quick] [--json FILE] [--peer-python PYTHON]

Same token ids, same output lengths, same threads, fp32 and greedy on both sides, in turn A B A B. The peer batches
requests in the order they come and chooses its best batch size. What it would do with requests sorted by output length,
which nobody knows beforehand, is printed beside. Prefix caching is off: every turn brings fresh tokens anyway.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import limits
from turns import Ours, Runner, Spread, loaded, same_tokens, use_threads
from workload import Workload, mixed

from twofold import EngineConfig
from twofold.commands.model import model_dir
from twofold.models import load, read_spec
from twofold.platforms import team_size, usable_cores

_ORDERS = {"arrival": "as they come            ", "sorted": "sorted by output length "}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
    parser.add_argument("--model", help="checkpoint directory (default: the bundled model)")
    parser.add_argument("--requests", type=int, help="how many requests (default: 48, fewer on fewer than 4 cores)")
    parser.add_argument(
        "--threads",
        type=int,
        default=team_size(),
        help="threads of each side (default: all cores, or all but one of three and more)",
    )
    parser.add_argument("--turns", type=int, default=5, help="how often each side runs (default: 5)")
    parser.add_argument("--quick", action="store_true", help="12 requests, one turn, one batch size: a smoke test")
    parser.add_argument("--json", type=Path, help="write the record to this file")
    parser.add_argument("--peer-python", help="python that has transformers (default: this one, when it has)")
    parser.add_argument("--no-peer", action="store_true", help="measure Twofold alone")
    return parser.parse_args()


def peer_python(args: argparse.Namespace) -> str | None:
    """The python to run the peer with, or None when there is no peer to run."""
    if args.no_peer:
        return None
    if args.peer_python:
        return str(args.peer_python)
    if importlib.util.find_spec("transformers"):
        return sys.executable
    print("transformers is not installed here: no peer. Install it in any environment and name --peer-python")
    return None


def choose(peer: Runner, work: Workload, quick: bool) -> tuple[int, str]:
    """The peer's fastest batch size for requests in the order they come; the other order is timed to be told."""
    sizes = [8] if quick else sorted({min(size, len(work.prompts)) for size in (8, 16, 48)})
    ways = [(size, order) for size in sizes for order in ("arrival", "sorted")]
    peer.ask(work, batch=ways[0][0], order=ways[0][1])  # its first run warms up
    timed: dict[tuple[int, str], float] = {}
    for size, order in ways:
        seconds = timed[size, order] = float(peer.ask(work, batch=size, order=order)["seconds"])
        rate = f"{work.tokens_out / seconds:8,.0f} output tokens/s"
        print(f"  peer in batches of {size:>2}, {_ORDERS[order]}: {rate}", flush=True)
    return min((way for way in timed if way[1] == "arrival"), key=lambda way: timed[way])


def main() -> None:
    args = arguments()
    model = model_dir(args.model)
    spec, cores = read_spec(model), usable_cores()
    turns, requests = (1, args.requests or 12) if args.quick else (args.turns, args.requests)

    def work(turn: int) -> Workload:
        return mixed(vocab=spec.vocab, context=spec.max_len, cores=cores, turn=turn, requests=requests)

    use_threads(args.threads)
    first = work(0)
    print(f"{model}: {spec.architecture}, fp32, {args.threads} threads, {len(first.prompts)} requests at once, greedy")
    print(f"mixed workload: {first.tokens_in} tokens in, {first.tokens_out} out; {first.scaled}")
    machine = limits.measure(args.threads, quick=args.quick)
    print(limits.line(machine), flush=True)
    ours = Ours(load(model), EngineConfig(dtype="float32", enable_prefix_caching=False))
    ours.run(first, -1)
    record: dict[str, Any] = {"model": str(model.name), "limits": machine, "scaled": first.scaled}
    python = peer_python(args)
    peer = loaded("transformers_static.py", python, model, args.threads) if python else None
    way = choose(peer, first, args.quick) if peer else (0, "")
    mine, theirs, equal = [], [], []
    for turn in range(1, turns + 1):
        seconds, tokens = ours.run(work(turn), turn)
        mine.append(seconds)
        if peer:
            answer = peer.ask(work(turn), batch=way[0], order=way[1])
            theirs.append(answer["seconds"])
            equal.append(same_tokens(tokens, answer["tokens"]))
    record |= report(first, mine, theirs, equal, ours.waste, peer.name if peer else "", way)
    if peer:
        peer.close()
    if args.json:
        args.json.write_text(json.dumps(record, indent=1) + "\n")


def report(
    work: Workload,
    mine: list[float],
    theirs: list[float],
    equal: list[float],
    waste: float,
    name: str,
    way: tuple[int, str],
) -> dict[str, Any]:
    """Print the result and return it as a record."""
    out, total = work.tokens_out, work.tokens_in + work.tokens_out
    rate = Spread.of([out / s for s in mine])
    both = Spread.of([total / s for s in mine])
    requests = Spread.of([len(work.prompts) / s for s in mine])
    record: dict[str, Any] = {"output_tokens_s": rate.median, "total_tokens_s": both.median, "kv_waste": waste}
    record["requests_s"] = requests.median
    print(f"twofold       {requests.text('requests/s', 2)}")
    print(f"              {rate.text('output tokens/s')}, {both.text('total tokens/s')}")
    print(f"KV waste      {waste:.1%} of allocated slots at most")
    if theirs:
        other = Spread.of([out / s for s in theirs])
        ratio = Spread.of([b / a for a, b in zip(mine, theirs, strict=True)])
        print(f"transformers  {other.text('output tokens/s')}; {name}, batches of {way[0]}, {way[1]}")
        print(f"ratio         {ratio.text('times transformers', 2)}; same tokens for {min(equal):.0%} of requests")
        record |= {"peer": name, "peer_batch": way[0], "peer_order": way[1], "peer_output_tokens_s": other.median}
        record |= {"ratio": ratio.median, "ratio_least": ratio.least, "same_tokens": min(equal)}
    return record


if __name__ == "__main__":
    main()
