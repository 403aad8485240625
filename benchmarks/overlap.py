"""What is gained by rolling out one step ahead of the update, and what does it cost to send new weights?

    twofold bench overlap [--quick] [--threads T] [--generator G] [--json FILE]

Whole steps of reinforcement, without rewards: rollouts by a generator in a process of its own, an update of the same
decoder on them (forward, backward, AdamW), new weights sent. In turn, each side has all T threads while the other
waits; one step ahead, the generator has G of them and the trainer the rest, all the time. Turns alternate, medians
count. Then weights are sent while the generator is generating, by each way and in buckets of each size, beside a plain
copy of as many bytes by one thread.
"""

from __future__ import annotations

import argparse
import json
import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from twofold.platforms import bound_spin, usable_cores

bound_spin()

import torch  # noqa: E402

from twofold import EngineConfig, SamplingParams  # noqa: E402
from twofold.align.ahead import Ahead  # noqa: E402
from twofold.align.remote import RemoteEngine, Transfer  # noqa: E402
from twofold.align.remote_config import RemoteConfig  # noqa: E402
from twofold.engine.request import Request  # noqa: E402
from twofold.models import Decoder, spec_from  # noqa: E402
from twofold.models.packed import PackedContext  # noqa: E402
from twofold.models.weights import decoder_tensors  # noqa: E402
from twofold.train import loss as losses  # noqa: E402
from twofold.train.config import OptimizerConfig  # noqa: E402
from twofold.train.init import init_weights  # noqa: E402
from twofold.train.optimizer import Optimizer  # noqa: E402

Rolled = list[list[int]]
"""Prompt and answer of each sequence."""
VOCAB, PROMPT, MICRO = 2048, 32, 512
SIZES = (256.0, 16.0, 1e-6)
"""MiB of a bucket; the last is a tensor each."""


def shape(*, quick: bool) -> dict[str, Any]:
    hidden, layers = (128, 2) if quick else (384, 6)
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": 11 * hidden // 4,
        "num_hidden_layers": layers,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "max_position_embeddings": 1024,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "vocab_size": VOCAB,
    }


class Side:
    """A policy that is trained on what its own generator says."""

    def __init__(self, model: dict[str, Any], *, sequences: int, length: int, trainer: int, generator: int) -> None:
        self.sequences, self.length, self.threads = sequences, length, trainer
        self.decoder = Decoder(spec_from(model))
        init_weights(self.decoder, 1)
        self.optimizer = Optimizer(self.decoder.named_parameters(), OptimizerConfig(lr=1e-4), norm=None)
        blocks = sequences * -(-(PROMPT + length) // 16) + 8
        config = EngineConfig(num_blocks=blocks, max_num_seqs=sequences, max_num_batched_tokens=max(512, sequences))
        self.engine = RemoteEngine(model, config, remote=RemoteConfig(threads=generator))
        self.seconds = {"rollout": 0.0, "update": 0.0, "send": 0.0}

    def roll(self, step: int) -> Rolled:
        """A step's sequences: prompts of random ids, answers of one length."""
        began = time.perf_counter()
        made: dict[str, list[int]] = {}
        for number in range(self.sequences):
            source = torch.Generator().manual_seed(step * self.sequences + number)
            ids = torch.randint(0, VOCAB, (PROMPT,), generator=source).tolist()
            name, params = f"{step}.{number}", SamplingParams(max_tokens=self.length, ignore_eos=True, logprobs=0)
            self.engine.submit(Request(id=name, prompt_ids=tuple(ids), params=params, seed=number))
            made[name] = ids
        while self.engine.has_work:
            for output in self.engine.step():
                made[output.request_id] += [token.id for token in output.tokens]
        self.seconds["rollout"] += time.perf_counter() - began
        return list(made.values())

    def update(self, rolled: Rolled) -> None:
        torch.set_num_threads(self.threads)
        began = time.perf_counter()
        total = sum(len(ids) - 1 for ids in rolled)
        each = max(1, MICRO // len(rolled[0]))
        for first in range(0, len(rolled), each):
            some = rolled[first : first + each]
            ids_T = torch.tensor([token for ids in some for token in ids])
            targets_T = torch.cat([torch.tensor([*ids[1:], losses.IGNORE]) for ids in some])
            hidden_TD = self.decoder(ids_T, PackedContext(tuple(map(len, some))))
            losses.backward(self.decoder, hidden_TD, targets_T, total, VOCAB)
        self.optimizer.clip()
        self.optimizer.step(1e-4)
        self.optimizer.zero()
        self.seconds["update"] += time.perf_counter() - began

    def send(self, version: int, load: Callable[..., Transfer]) -> None:
        began = time.perf_counter()
        load(decoder_tensors(self.decoder), version)
        self.seconds["send"] += time.perf_counter() - began


def in_turn(side: Side, first: int, steps: int) -> None:
    for step in range(first, first + steps):
        side.update(side.roll(step))
        side.send(step + 1, side.engine.load_weights)


class AheadOf:
    """Steps one ahead, over several turns: a turn ends when its last batch was trained on, the next under way."""

    def __init__(self, side: Side, last: int) -> None:
        self.side, self.ahead = side, Ahead(side.engine, side.roll, Rolled, steps=last)

    def __call__(self, first: int, steps: int) -> None:
        for step in range(first, first + steps):
            self.side.update(self.ahead.take(step))
            self.side.send(step + 1, self.ahead.send)
        self.ahead.state()  # what is under way belongs to this turn, as the first of it was made in the turn before


def steps_of_both(args: argparse.Namespace) -> dict[str, Any]:
    """Tokens a second of whole steps, the sides in turn."""
    model = shape(quick=args.quick)
    work = {"sequences": 8 if args.quick else 16, "length": 32 if args.quick else 96}
    trainer = max(1, args.threads - args.generator)
    last = 1 + args.turns * args.steps + 1
    sides = {
        "in turn": Side(model, trainer=args.threads, generator=args.threads, **work),
        "one ahead": Side(model, trainer=trainer, generator=args.generator, **work),
    }
    ways: dict[str, Callable[[int, int], None]] = {
        "in turn": lambda first, steps: in_turn(sides["in turn"], first, steps),
        "one ahead": AheadOf(sides["one ahead"], last),
    }
    rates: dict[str, list[float]] = {name: [] for name in sides}
    try:
        for name, side in sides.items():
            side.send(0, side.engine.load_weights)
            ways[name](0, 1)  # to warm up
            side.seconds = dict.fromkeys(side.seconds, 0.0)
        for turn in range(args.turns):
            for name in sides if turn % 2 == 0 else reversed(sides):
                began = time.perf_counter()
                ways[name](1 + turn * args.steps, args.steps)
                tokens = args.steps * work["sequences"] * work["length"]
                rates[name].append(tokens / (time.perf_counter() - began))
    finally:
        for side in sides.values():
            side.engine.close()
    count = args.turns * args.steps
    return {
        "threads": {"in turn": [args.threads, args.threads], "one ahead": [trainer, args.generator]},
        "tokens_per_second": rates,
        "seconds_a_step": {name: {k: v / count for k, v in side.seconds.items()} for name, side in sides.items()},
        "gain": [ahead / turn for ahead, turn in zip(rates["one ahead"], rates["in turn"], strict=True)],
    }


def busy(engine: RemoteEngine, stop: threading.Event) -> None:
    """Keep a generator generating."""
    number = 0
    while not stop.is_set():
        for _ in range(4):
            number += 1
            params = SamplingParams(max_tokens=200, ignore_eos=True)
            engine.submit(Request(id=f"{number}", prompt_ids=tuple(range(PROMPT)), params=params, seed=number))
        while engine.has_work:
            engine.step()


def costs_of_sending(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Bytes, seconds and pause of a transfer into a generator at work, and a copy of as much memory, in turn."""
    model = shape(quick=args.quick)
    decoder = Decoder(spec_from(model))
    init_weights(decoder, 1)
    torch.set_num_threads(1)
    records = []
    for transport in ("shared", "gloo"):
        for bucket_mb in SIZES[:1] if args.quick else SIZES:
            remote = RemoteConfig(transport=transport, bucket_mb=bucket_mb, threads=args.generator)
            stop, config = threading.Event(), EngineConfig(num_blocks=128, max_num_seqs=8)
            with RemoteEngine(model, config, remote=remote) as engine:
                engine.load_weights(decoder_tensors(decoder), 0)
                work = threading.Thread(target=busy, args=(engine, stop), daemon=True)
                work.start()
                told = [_sent(engine, decoder, version) for version in range(1, 2 + args.turns)][1:]
                stop.set()
                work.join()
            record: dict[str, Any] = {key: statistics.median(each[key] for each in told) for key in told[0]}
            records.append({"transport": transport, "bucket_mb": bucket_mb} | record)
    return records


def _sent(engine: RemoteEngine, decoder: Decoder, version: int) -> dict[str, float]:
    told = engine.load_weights(decoder_tensors(decoder), version)
    source, target = torch.ones(told.nbytes, dtype=torch.uint8), torch.ones(told.nbytes, dtype=torch.uint8)
    began = time.perf_counter()
    target.copy_(source)
    seconds = time.perf_counter() - began
    assert told.pause is not None, "it was swapped in"
    return {"nbytes": told.nbytes, "seconds": told.seconds, "pause": told.pause, "copy_seconds": seconds}


def report(record: dict[str, Any]) -> None:
    steps = record["steps"]
    print("                threads (trainer, generator)   tokens/s        rollout  update    send, seconds a step")
    for name, rates in steps["tokens_per_second"].items():
        seconds = steps["seconds_a_step"][name]
        print(
            f"{name:<15} {steps['threads'][name]!s:<28} {statistics.median(rates):>10,.0f} "
            f"{seconds['rollout']:>14.3f} {seconds['update']:>7.3f} {seconds['send']:>7.3f}"
        )
    gains = steps["gain"]
    print(f"one step ahead: {statistics.median(gains):.2f} times ({min(gains):.2f} to {max(gains):.2f} by turn)\n")
    print("transport  bucket MiB        MB    seconds    GB/s    of a copy's   pause ms   while generating")
    for row in record["sending"]:
        size = "a tensor" if row["bucket_mb"] < 1e-3 else f"{row['bucket_mb']:.0f}"
        rate, copy = row["nbytes"] / row["seconds"] / 1e9, row["nbytes"] / row["copy_seconds"] / 1e9
        print(
            f"{row['transport']:<10} {size:>10} {row['nbytes'] / 1e6:>9.1f} {row['seconds']:>10.4f} {rate:>7.2f} "
            f"{rate / copy:>13.1%} {1e3 * row['pause']:>10.2f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
    cores = usable_cores()
    parser.add_argument("--quick", action="store_true", help="a small model and few steps: under a minute")
    parser.add_argument("--threads", type=int, default=cores, help=f"threads in all (default: {cores})")
    parser.add_argument("--generator", type=int, help="threads of the generator when both work (default: half)")
    parser.add_argument("--turns", type=int, help="turns of each side (default: 5; quick: 2)")
    parser.add_argument("--steps", type=int, default=2, help="steps of a turn (default: 2)")
    parser.add_argument("--json", type=Path, help="write the record to this file")
    args = parser.parse_args()
    args.generator = args.generator or max(1, args.threads // 2)
    args.turns = args.turns or (2 if args.quick else 5)
    record = {"steps": steps_of_both(args), "sending": costs_of_sending(args)}
    report(record)
    if args.json:
        args.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
