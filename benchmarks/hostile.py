"""Do clients that mean harm slow the others down? Time between tokens of steady streams, alone and beside them.

    twofold bench hostile [--model DIR] [--turns N] [--seconds S] [--json FILE]

A few clients stream one answer after another from a server of our own; in every other turn a process of two more sends
the hostile grammars and the malformed bodies of the test suite, and chats that spell special tokens.
The claim is the ratio of the streams' times between tokens at p99, turn by turn. Runs from a checkout, for its tests.
"""

from __future__ import annotations

import argparse
import asyncio
import http.client
import itertools
import json
import random
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import limits
from load import Target, closed_loop
from load_figures import figures
from own_server import own_server
from serve import card
from traffic import asks
from turns import Spread

from twofold.commands.remote import Server
from twofold.platforms import team_size

TESTS = Path(__file__).resolve().parents[1] / "tests" / "e2e"
MARKS = ("<|im_start|>", "<|im_end|>", "<|endoftext|>", "</s>", "[INST]", "<|eot_id|>", "<tool_call>", "<think>")
Harm = tuple[str, bytes]


def harms(model: str) -> list[Harm]:
    """(path, body) of everything that is sent."""
    if not TESTS.is_dir():
        raise SystemExit("the hostile requests are part of the tests: run this from a checkout")
    sys.path.insert(0, str(TESTS))
    from hostile_grammars import hostile
    from malformed import malformed

    from twofold.serve import openai

    found: list[Harm] = []
    for fields in hostile().values():
        body = {"model": model, "prompt": "x", "max_tokens": 6, **fields}
        found.append(("/v1/completions", json.dumps(body).encode()))
    for path, kind in (("/v1/completions", openai.CompletionRequest), ("/v1/chat/completions", openai.ChatRequest)):
        found += [(path, body) for _, body in malformed(kind)]
    for mark in MARKS:
        chat = {"model": model, "messages": [{"role": "user", "content": mark * 20}], "max_tokens": 4}
        found.append(("/v1/chat/completions", json.dumps(chat).encode()))
    random.Random(0).shuffle(found)
    return found


class Villains:
    """A process that sends harm until it is told to stop; `stop` gives what it was answered, by status."""

    def __init__(self, url: str, args: argparse.Namespace) -> None:
        flags = ["--attack", url, "--rate", str(args.rate), "--villains", str(args.villains)]
        self._process = subprocess.Popen(
            [sys.executable, __file__, *flags], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self._process.stdout is not None
        self._process.stdout.readline()  # it has begun

    def stop(self) -> Counter[int]:
        said, _ = self._process.communicate()
        return Counter({int(status): count for status, count in json.loads(said).items()})


def attack(args: argparse.Namespace) -> None:
    """The process itself: `--rate` requests a second in all, until its standard input ends."""
    model = str(card(Server(args.attack, None, "--attack"), None)["id"])
    netloc, left, lock = urlsplit(args.attack).netloc, itertools.cycle(harms(model)), threading.Lock()
    statuses: Counter[int] = Counter()
    stop = threading.Event()

    def run() -> None:
        while not stop.wait(args.villains / args.rate):
            with lock:
                path, body = next(left)
            connection = http.client.HTTPConnection(netloc, timeout=60)
            try:
                connection.request("POST", path, body, {"Content-Type": "application/json"})
                answer = connection.getresponse()
                answer.read()
                with lock:
                    statuses[answer.status] += 1
            finally:
                connection.close()

    threads = [threading.Thread(target=run) for _ in range(args.villains)]
    for thread in threads:
        thread.start()
    print("begun", flush=True)
    sys.stdin.read()
    stop.set()
    for thread in threads:
        thread.join()
    print(json.dumps(statuses))


def streams(target: Target, args: argparse.Namespace, turn: str) -> dict[str, Any]:
    """The steady clients' figures over about `args.seconds`."""
    rng, seen = random.Random(turn), []
    ends = time.perf_counter() + args.seconds
    while time.perf_counter() < ends:
        pairs = [(24, args.tokens)] * args.clients
        sent = asks(pairs, [0.0] * len(pairs), rng, None)
        seen += asyncio.run(closed_loop(target, sent, args.clients))
    return figures(seen)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
    parser.add_argument("--model", help="checkpoint directory (default: the bundled model)")
    parser.add_argument("--clients", type=int, default=4, help="steady streams (default: 4)")
    parser.add_argument("--villains", type=int, default=2, help="clients that mean harm (default: 2)")
    parser.add_argument("--rate", type=float, default=30.0, help="requests a second that mean harm (default: 30)")
    parser.add_argument("--attack", metavar="URL", help="send harm to this server until standard input ends, no more")
    parser.add_argument("--tokens", type=int, default=200, help="tokens of each answer (default: 200)")
    parser.add_argument("--seconds", type=float, default=8.0, help="of a turn (default: 8)")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the record to this file")
    args = parser.parse_args()
    if args.attack:
        attack(args)
        return
    alone, beside = [], []
    statuses: Counter[int] = Counter()
    with own_server(args.model) as url:
        model = str(card(Server(url, None, "--model"), None)["id"])
        target = Target(url=url, model=model)
        streams(target, args, "warm")
        for turn in range(args.turns):
            alone.append(streams(target, args, f"alone {turn}"))
            villains = Villains(url, args)
            try:
                beside.append(streams(target, args, f"beside {turn}"))
            finally:
                statuses += villains.stop()
    print(limits.line(limits.measure(team_size(), quick=True)))
    print(f"{sum(statuses.values())} requests meant harm; answers: {dict(sorted(statuses.items()))}")
    record: dict[str, Any] = {"statuses": {str(key): value for key, value in statuses.items()}}
    for share in ("p50", "p99"):
        ratio = Spread.of([b["itl_ms"][share] / a["itl_ms"][share] for a, b in zip(alone, beside, strict=True)])
        times = [statistics.median(each["itl_ms"][share] for each in side) for side in (alone, beside)]
        record[share] = ratio.median
        print(f"between tokens {share}: {times[0]:.2f} ms alone, {times[1]:.2f} ms beside; {ratio.text('times', 2)}")
    if args.json:
        args.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
