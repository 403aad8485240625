"""What does rollout() cost beside the bare engine, and what does the engine cost to be given new weights?

    twofold bench rollouts [--model DIR] [--turns N] [--quick] [--json FILE]

16 prompts of 64 ids, 8 samples of each, 128 new tokens, fp32, end tokens ignored; the bare engine is given the same
requests with the same seeds, in turn A B A B. Time outside of the engine is what rollout() takes between two of its
steps, by the same clock. New weights: all where they were, one moved (so that the program is written anew), and with
the cache's memory given back and taken again.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import limits
from turns import Spread, use_threads
from workload import draw

from twofold import EngineConfig, SamplingParams
from twofold.align.episode import Prompt
from twofold.align.rollout import rollout, seed_of
from twofold.commands.model import model_dir
from twofold.data import ChatTemplate, Tokenizer
from twofold.engine.engine import Engine
from twofold.engine.request import Output, Request
from twofold.models import load
from twofold.models.decoder import Decoder
from twofold.platforms import team_size

GROUP, LONG, NEW, SEED = 8, 64, 128, 1


@dataclass(frozen=True)
class Words:
    tokenizer: Tokenizer
    template: ChatTemplate | None = None


class Timed(Engine):
    """An engine that knows how long it was at work."""

    inside = 0.0

    def submit(self, request: Request) -> None:
        started = time.perf_counter()
        super().submit(request)
        self.inside += time.perf_counter() - started

    def step(self) -> list[Output]:
        started = time.perf_counter()
        outputs = super().step()
        self.inside += time.perf_counter() - started
        return outputs


class Bench:
    """One model, its prompts, and the ways to go through them."""

    def __init__(self, model: Path, quick: bool) -> None:
        self.decoder: Decoder = load(model)
        self.words = Words(Tokenizer.load(model))
        ids, vocab = random.Random(5), self.decoder.spec.vocab
        self.prompts = [Prompt(number=i, ids=draw(ids, LONG, vocab)) for i in range(4 if quick else 16)]
        self.params = SamplingParams(
            max_tokens=16 if quick else NEW, ignore_eos=True, logprobs=0, logprobs_mode="tempered"
        )

    @property
    def tokens(self) -> int:
        return len(self.prompts) * GROUP * (self.params.max_tokens or 0)

    def engine(self) -> Timed:
        config = EngineConfig(dtype="float32", num_blocks=2000, max_num_seqs=128, max_num_batched_tokens=2048)
        return Timed(self.decoder, config, eos_ids=self.words.tokenizer.eos_ids)

    def bare(self) -> float:
        engine = self.engine()
        started = time.perf_counter()
        for prompt in self.prompts:
            for k in range(GROUP):
                seed = seed_of(SEED, prompt.number)
                name = f"{prompt.number}.{k}"
                engine.submit(Request(id=name, prompt_ids=prompt.ids, params=self.params, sample=k, seed=seed))
        while engine.has_work:
            engine.step()
        return time.perf_counter() - started

    def rollout(self) -> tuple[float, float, Timed]:
        """Seconds, seconds outside of the engine, and the engine."""
        engine = self.engine()
        started = time.perf_counter()
        for _ in rollout(engine, self.prompts, GROUP, self.params, seed=SEED, words=self.words):
            pass
        took = time.perf_counter() - started
        return took, took - engine.inside, engine

    def new_weights(self, repeats: int) -> dict[str, float]:
        """Median milliseconds of each way to take new weights over."""
        engine = self.engine()

        def there() -> None:
            engine.load_weights(None, engine.version + 1)

        def moved() -> None:
            weight = self.decoder.get_parameter("layers.0.down.weight")
            weight.data = weight.data.clone()
            there()

        def slept() -> None:
            engine.sleep()
            engine.wake()
            there()

        ways = {"all in place": there, "one moved": moved, "asleep and awake": slept}
        return {name: 1e3 * statistics.median(_seconds(way) for _ in range(repeats)) for name, way in ways.items()}


def _seconds(way: Any) -> float:
    started = time.perf_counter()
    way()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
    parser.add_argument("--model", help="checkpoint directory (default: the bundled model)")
    parser.add_argument("--threads", type=int, default=team_size(), help="threads (default: all cores, or all but one)")
    parser.add_argument("--turns", type=int, default=7, help="how often each side runs (default: 7)")
    parser.add_argument("--quick", action="store_true", help="4 prompts, 16 tokens, one turn: a smoke test")
    parser.add_argument("--json", type=Path, help="write the record to this file")
    args = parser.parse_args()
    use_threads(args.threads)
    machine = limits.measure(args.threads, quick=args.quick)
    print(limits.line(machine), flush=True)
    bench = Bench(model_dir(args.model), args.quick)
    bench.rollout()
    bare, whole, outside = [], [], []
    for _ in range(1 if args.quick else args.turns):
        bare.append(bench.bare())
        took, beside, engine = bench.rollout()
        whole.append(took)
        outside.append(beside / took)
    rates = [Spread.of([bench.tokens / s for s in seconds]) for seconds in (bare, whole)]
    share, ratio = Spread.of(outside), Spread.of([b / a for a, b in zip(bare, whole, strict=True)])
    stats = engine.stats()
    least = len(bench.prompts) * LONG
    computed = stats.computed_tokens - (stats.generation_tokens - len(bench.prompts) * GROUP)
    weights = bench.new_weights(3 if args.quick else 21)
    print(f"bare engine            {rates[0].text('tokens/s')}")
    print(f"rollout                {rates[1].text('tokens/s')}, {ratio.text('times the bare engine in time', 2)}")
    bounds = f"{share.least:.2%} to {share.most:.2%}"
    print(f"outside of the engine  {share.median:.2%} of the time ({bounds}); goal: under 3%")
    print(f"tokens of prompts      {computed:,} computed; {GROUP * least:,} were nothing shared, {least:,} were all")
    for name, milliseconds in weights.items():
        print(f"new weights, {name:<17} {milliseconds:.2f} ms")
    record = {"limits": machine, "bare_tokens_s": rates[0].median, "rollout_tokens_s": rates[1].median}
    record |= {"time_ratio": ratio.median, "outside_share": share.median, "prompt_tokens": computed, "sync_ms": weights}
    if args.json:
        args.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
