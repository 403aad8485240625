"""How does a server do under load? Any server that speaks OpenAI's API; without an address, one of our own.

    twofold bench serve [--base-url http://HOST:PORT/v1] [--dataset random|fixed|sharegpt|fastgen]
                        [--request-rate R] [--burstiness B] [--goodput ttft:200 tpot:50] [--json FILE] [--svg FILE]
    twofold bench serve --sla             DeepSpeed-FastGen's curves: 1 to 32 clients, each sends when it was answered

Requests are sent when they are due, whether or not earlier ones are answered. TTFT, ITL, TPOT, E2EL and goodput are
those of vLLM's benchmark (load_figures.py says them exactly).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import random
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import limits
from load import Target, closed_loop, open_loop
from load_chart import Plot, draw
from load_figures import LIMITS, figures, under_agreement
from own_server import own_server
from traffic import KINDS, Ask, Lengths, arrivals, asks

from twofold.commands.remote import Server
from twofold.platforms import team_size

CLIENTS = (1, 2, 4, 6, 8, 12, 16, 20, 24, 28, 32)


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("--base-url", help="the server, such as http://127.0.0.1:8000/v1 (default: one of our own is started)")
    add(
        "--model", help="the model's name there; of our own server, its directory (default: the first, the bundled one)"
    )
    add("--api-key", help="the server's key (default: $TWOFOLD_API_KEY)")
    add("--server-flag", action="append", default=[], help="a flag of our own server: --server-flag=--max-num-seqs=8")
    add("--endpoint", choices=["completions", "chat"], default="completions")
    add("--text", action="store_true", help="send words instead of token ids, which not every server takes")
    add("--vocab-size", type=int, default=512, help="token ids are drawn below this (default: 512)")
    add("--dataset", choices=KINDS, default="random", help="the shape of lengths (default: random)")
    add("--input-len", type=int, default=1024, help="tokens of a prompt, or their mean (default: 1024)")
    add("--output-len", type=int, default=128, help="tokens of an answer, or their mean (default: 128)")
    add("--range-ratio", type=float, default=0.0, help="random: lengths between (1 - r) and (1 + r) times (default: 0)")
    add("--num-prompts", type=int, default=100, help="requests (of each point with --sla; default: 100)")
    add("--request-rate", type=float, default=math.inf, help="requests a second (default: all at once)")
    add("--burstiness", type=float, default=1.0, help="shape of the gamma arrivals, 1 is Poisson (default: 1)")
    add("--max-concurrency", type=int, help="at most so many requests at once")
    add("--temperature", type=float, default=0.0)
    add("--no-ignore-eos", action="store_true", help="let answers end by themselves; servers without ignore_eos")
    add("--goodput", nargs="+", default=[], metavar="NAME:MS", help=f"limits in milliseconds of {', '.join(LIMITS)}")
    add("--num-warmups", type=int, default=4, help="requests before the clock starts (default: 4)")
    add("--sla", action="store_true", help="FastGen's curves instead of one run")
    add("--clients", type=int, nargs="+", default=list(CLIENTS), help="with --sla: how many clients at each point")
    add("--sla-rates", type=float, nargs="+", default=[2.0, 4.0, 6.0], help="with --sla: tokens a second promised")
    add("--context", type=int, help="shrink lengths to this context (default: what the server says)")
    add("--seed", type=int, default=0)
    add("--json", type=Path, help="write the record to this file")
    add("--svg", type=Path, help="draw it into this file")
    args = parser.parse_args(argv)
    args.limits = read_limits(parser, args.goodput)
    for name in ("request_rate", "burstiness", "num_prompts"):
        if getattr(args, name) <= 0:
            parser.error(f"--{name.replace('_', '-')} must be above 0, not {getattr(args, name)}")
    return args


def read_limits(parser: argparse.ArgumentParser, given: list[str]) -> dict[str, float]:
    """`ttft:200` and its like."""
    found: dict[str, float] = {}
    for each in given:
        name, _, value = each.partition(":")
        if name not in LIMITS or not value.replace(".", "", 1).isdigit():
            parser.error(f"--goodput takes {', '.join(f'{n}:MILLISECONDS' for n in LIMITS)}, not '{each}'")
        found[name] = float(value)
    return found


def card(server: Server, name: str | None) -> dict[str, Any]:
    """What a server tells of a model; its context under vLLM's name, where it tells that."""
    with server.asked("models") as answer:
        models: list[dict[str, Any]] = json.loads(answer.read())["data"]
    found = next((each for each in models if name in (None, each["id"])), None)
    if found is None:
        raise SystemExit(f"no model '{name}' there: it has {', '.join(str(each['id']) for each in models)}")
    return found


class Load:
    """Requests of the chosen shape, against one server."""

    def __init__(self, args: argparse.Namespace, target: Target, context: int) -> None:
        self.args, self.target = args, target
        self.context = args.context or context
        self.lengths = Lengths(
            kind=args.dataset, input_len=args.input_len, output_len=args.output_len, range_ratio=args.range_ratio
        )
        self.shrink = 1.0
        self._turn = 0

    def asks(self, count: int, rate: float) -> list[Ask]:
        """Fresh requests: no prompt is ever sent twice, so no cache helps."""
        rng = random.Random(f"{self.args.seed} {self._turn}")
        self._turn += 1
        words = self.args.text or self.target.chat
        pairs, self.shrink = self.lengths.draw(count, rng, self.context)
        vocab = None if words else self.args.vocab_size
        return asks(pairs, arrivals(count, rate, self.args.burstiness, rng), rng, vocab)

    def warm_up(self) -> None:
        if self.args.num_warmups:
            asyncio.run(closed_loop(self.target, self.asks(self.args.num_warmups, math.inf), 1))

    def once(self) -> dict[str, Any]:
        sent = self.asks(self.args.num_prompts, self.args.request_rate)
        seen = asyncio.run(open_loop(self.target, sent, self.args.max_concurrency))
        return figures(seen, self.args.limits)

    def curve(self) -> list[dict[str, Any]]:
        points = []
        for clients in self.args.clients:
            seen = asyncio.run(closed_loop(self.target, self.asks(self.args.num_prompts, math.inf), clients))
            point = {"clients": clients, **under_agreement(seen, self.args.sla_rates)}
            kept = ", ".join(f"{value:.2f} at {rate}/s" for rate, value in point["effective_s"].items())
            print(
                f"{clients:>3} clients: {point['requests_s']:.2f} requests/s, {point['latency_s']:.2f} s each; "
                f"within the agreement {kept}",
                flush=True,
            )
            points.append(point)
        return points


def told(found: dict[str, Any]) -> str:
    lines = [
        f"{found['completed']} answered, {found['failed']} failed in {found['seconds']:.1f} s",
        f"{found['requests_s']:.2f} requests/s, {found['output_tokens_s']:,.0f} output tokens/s, "
        f"{found['total_tokens_s']:,.0f} tokens/s in and out, {found['peak_tokens_s']:,.0f} pieces in the best second",
    ]
    for name in ("ttft", "tpot", "itl", "e2el", "lag"):
        if spread := found[f"{name}_ms"]:
            of = ", ".join(f"{key} {value:,.1f}" for key, value in spread.items())
            lines.append(f"{name.upper():<5} ms  {of}")
    if "goodput_s" in found:
        within = ", ".join(f"{name} {value:g} ms" for name, value in found["limits_ms"].items())
        lines.append(f"goodput   {found['goodput_s']:.2f} requests/s within {within}")
    if found["error"]:
        lines.append(f"first failure: {found['error']}")
    return "\n".join(lines)


def plots(record: dict[str, Any]) -> list[Plot]:
    if curve := record.get("curve"):
        latency = {"all": [(point["requests_s"], point["latency_s"]) for point in curve]}
        kept = {
            f"{rate} tokens/s": [(point["clients"], point["effective_s"][rate]) for point in curve]
            for rate in curve[0]["effective_s"]
        }
        return [
            Plot(title="latency and throughput", x="requests/s", y="seconds a request", lines=latency),
            Plot(title="within the agreement", x="clients", y="requests/s", lines=kept),
        ]
    shares = (("p50", 50), ("p90", 90), ("p95", 95), ("p99", 99))
    found = record["run"]

    def line(*names: str) -> dict[str, list[tuple[float, float]]]:
        return {
            name.upper(): [(x, found[f"{name}_ms"][key]) for key, x in shares if key in found[f"{name}_ms"]]
            for name in names
        }

    return [
        Plot(title="first piece and whole answer", x="percentile", y="ms", lines=line("ttft", "e2el")),
        Plot(title="between pieces", x="percentile", y="ms", lines=line("itl", "tpot")),
    ]


def main() -> None:
    args = arguments()
    with ExitStack() as stack:
        own = args.base_url is None
        url = stack.enter_context(own_server(args.model, args.server_flag)) if own else args.base_url
        server = Server(url, args.api_key, "--base-url")
        model = card(server, None if own else args.model)
        target = Target(
            url=url if url.rstrip("/").endswith("/v1") else f"{url.rstrip('/')}/v1",
            model=str(model["id"]),
            chat=args.endpoint == "chat",
            key=args.api_key,
            ignore_eos=not args.no_ignore_eos,
            temperature=args.temperature,
        )
        load = Load(args, target, int(model.get("max_model_len") or 4096))
        load.warm_up()
        record: dict[str, Any] = {"url": "own" if own else url, "model": target.model, "dataset": args.dataset}
        if args.sla:
            record["curve"] = load.curve()
        else:
            record["run"] = load.once()
    shrunk = "not scaled" if load.shrink == 1.0 else f"lengths times {load.shrink:.2f} for {load.context} tokens"
    rate = "all at once" if math.isinf(args.request_rate) else f"{args.request_rate:g} a second"
    record |= {"scaled": shrunk, "request_rate": rate, "burstiness": args.burstiness, "threads": team_size()}
    note = f"{target.model}, {args.dataset} {args.input_len}/{args.output_len}, {shrunk}, {rate}"
    print(note)
    if own:
        machine = record["limits"] = limits.measure(team_size(), quick=True)
        print(limits.line(machine))
    if not args.sla:
        print(told(record["run"]))
    if args.json:
        args.json.write_text(json.dumps(record, indent=1) + "\n")
    if args.svg:
        args.svg.write_text(draw("A server under load", note, plots(record)))


if __name__ == "__main__":
    main()
