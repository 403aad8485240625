"""What do adapters cost a served model?

    twofold bench adapters [--model quick|reference] [--format fp32|bf16|int8|int4] [--layers N] [--rank N] [--busy]

Four engines on the same weights take turns, a step each, A B C D A B C D: no adapters, eight loaded and none asked for,
one that every request has, and eight of mixed ranks. Decode steps of 1, 16 and 64 requests, and a prompt of 512 tokens
of its own. A ratio is a step's time over that of the plain engine's step just before it; medians, and quartiles.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import model as models
import torch

from twofold.engine.config import EngineConfig
from twofold.engine.engine import Engine
from twofold.engine.request import Request
from twofold.engine.sampling import SamplingParams
from twofold.models import Decoder, LoraConfig, save_adapter, spec_from
from twofold.models.lora import adapt, pair_parameters, take_away
from twofold.models.quantized import formats, quantize_weights
from twofold.platforms import usable_cores
from twofold.train.init import init_weights

PLAIN = "none loaded"
MIXED = (4, 8, 16, 16, 16, 32, 32, 64)
BATCHES = (1, 16, 64)
PROMPT = 512


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
    parser.add_argument("--model", choices=sorted(models.MODELS), default="reference")
    parser.add_argument("--format", choices=("fp32", "bf16", "int8", "int4"), default="bf16")
    parser.add_argument("--rank", type=int, default=16, help="of the one adapter that all requests have (default 16)")
    parser.add_argument("--layers", type=int, help="of the model, fewer than it has; the head counts for more then")
    parser.add_argument("--busy", action="store_true", help="one thread and its own seconds, for a machine with others")
    parser.add_argument("--rounds", type=int, default=60, help="steps of each engine and workload (default 60)")
    parser.add_argument("--threads", type=int, default=usable_cores(), help="default: all cores")
    parser.add_argument("--quick", action="store_true", help="the small model and a few rounds")
    parser.add_argument("--json", type=Path, help="write the record to this file")
    args = parser.parse_args()
    if args.quick:
        args.model, args.rounds = "quick", min(args.rounds, 8)
    if args.busy:
        args.threads = 1
    return args


def decoder_of(name: str, form: str, layers: int | None = None) -> Decoder:
    """Random weights of a model's shape, in a number format."""
    config = models.MODELS[name]
    spec = spec_from(config | {"num_hidden_layers": layers or config["num_hidden_layers"]})
    decoder = Decoder(spec, dtype=torch.float32 if form == "fp32" else torch.bfloat16, max_len=1024)
    init_weights(decoder, 0)
    decoder.requires_grad_(False)
    if form in ("int8", "int4"):
        quantize_weights(decoder, formats(decoder, form))
    return decoder


def write_adapter(decoder: Decoder, path: Path, rank: int, seed: int) -> Path:
    """An adapter of every linear layer with numbers in it, in bf16, as a PEFT directory."""
    adapt(decoder, LoraConfig(rank=rank, alpha=2.0 * rank), seed)
    for number, (name, parameter) in enumerate(pair_parameters(decoder).items()):
        if name.endswith(".b"):
            with torch.no_grad():
                parameter.normal_(std=0.01, generator=torch.Generator().manual_seed(seed * 10_000 + number))
    save_adapter(decoder, path, dtype=torch.bfloat16)
    take_away(decoder)
    decoder.requires_grad_(False)
    return path


class Bench:
    """The engines, and who has which adapter in each."""

    def __init__(
        self, decoder: Decoder, folder: Path, rank: int, kv_dtype: str, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._number, self._clock, self._vocab = 0, clock, decoder.spec.vocab
        one = write_adapter(decoder, folder / "one", rank, 100)
        mixed = [write_adapter(decoder, folder / str(i), r, i) for i, r in enumerate(MIXED)]
        names = [path.name for path in mixed]
        self.who: dict[str, Callable[[int], str]] = {
            PLAIN: lambda i: "",
            "8 loaded, none used": lambda i: "",
            f"one of rank {rank}": lambda i: "one",
            "8 of mixed ranks": lambda i: names[i % len(names)],
        }
        self.engines: dict[str, Engine] = {}
        for name in self.who:
            engine = Engine(decoder, config(kv_dtype, name != PLAIN))
            for path in (one, *mixed) if name != PLAIN else ():
                engine.adapters.load(path.name, str(path))
            self.engines[name] = engine

    def submit(self, name: str, count: int, prompt: int, tokens: int) -> None:
        for i in range(count):
            self._number += 1
            ids = tuple((self._number * 7919 + j * 104_729) % self._vocab for j in range(prompt))
            params = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)
            self.engines[name].submit(
                Request(id=f"{name}/{self._number}", prompt_ids=ids, params=params, adapter=self.who[name](i))
            )

    def decode(self, batch: int, rounds: int) -> dict[str, list[float]]:
        """Seconds of each decode step of `batch` requests, round by round."""
        for name, engine in self.engines.items():
            self.submit(name, batch, 24, rounds + 8)
            while engine.scheduler.waiting or any(row.remaining > 1 for row in engine.scheduler.running):
                engine.step()
        found = self._rounds(rounds, lambda engine: engine.step(), warm=2)
        for engine in self.engines.values():
            while engine.has_work:
                engine.step()
        return found

    def prefill(self, rounds: int) -> dict[str, list[float]]:
        """Seconds of one prompt, round by round."""

        def run(engine: Engine) -> None:
            name = next(name for name, each in self.engines.items() if each is engine)
            self.submit(name, 1, PROMPT, 1)
            while engine.has_work:
                engine.step()

        return self._rounds(max(rounds // 4, 4), run, warm=1)

    def _rounds(self, rounds: int, run: Callable[[Engine], object], warm: int) -> dict[str, list[float]]:
        found: dict[str, list[float]] = {name: [] for name in self.engines}
        for round_ in range(rounds + warm):
            for name, engine in self.engines.items():
                began = self._clock()
                run(engine)
                if round_ >= warm:
                    found[name].append(self._clock() - began)
        return found


def config(kv_dtype: str, lora: bool) -> EngineConfig:
    return EngineConfig(
        enable_lora=lora,
        max_loras=len(MIXED) + 1,
        max_num_seqs=max(BATCHES),
        max_num_batched_tokens=1024,
        num_blocks=max(BATCHES) * 10,
        enable_prefix_caching=False,
        kv_dtype=kv_dtype,  # type: ignore[arg-type]
        lora_cache_bytes=4 << 30,
    )


def ratios(found: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """Of each engine: milliseconds, and its time over the plain engine's, round by round: median and quartiles."""
    told = {}
    for name, seconds in found.items():
        low, middle, high = statistics.quantiles([a / b for a, b in zip(seconds, found[PLAIN], strict=True)], n=4)
        told[name] = {"ms": statistics.median(seconds) * 1e3, "ratio": middle, "low": low, "high": high}
    return told


def main() -> int:
    args = arguments()
    torch.set_num_threads(args.threads)
    kv_dtype = "float32" if args.format == "fp32" else "bfloat16"
    record: dict[str, Any] = {"model": args.model, "format": args.format, "threads": args.threads, "rank": args.rank}
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        clock = time.process_time if args.busy else time.perf_counter
        decoder = decoder_of(args.model, args.format, args.layers)
        bench = Bench(decoder, Path(folder), args.rank, kv_dtype, clock)
        works = {f"decode, {batch}": bench.decode(batch, args.rounds) for batch in BATCHES}
        works[f"prompt of {PROMPT}"] = bench.prefill(args.rounds)
    print(f"{args.model}, {args.format}, {args.threads} threads: time over that without adapters (quartiles)")
    for work, found in works.items():
        record[work] = ratios(found)
        print(f"  {work}: {record[work][PLAIN]['ms']:.2f} ms")
        for name, row in record[work].items():
            if name != PLAIN:
                print(f"    {name:22} {row['ratio']:.3f}  ({row['low']:.3f} to {row['high']:.3f})")
    if args.json:
        args.json.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
