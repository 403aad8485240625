"""What is the time to the first token of a long prompt whose beginning was computed before, by where it is found?

    twofold bench tiers [--model quick|reference] [--lengths 32,128,...] [--turns N] [--kv-dtype D] [--json FILE]

Recomputed: nobody has seen it. Pool: the cache still has it. Host: the pool forgot it, host memory has it. Disk: a new
process whose engine has just loaded, and files that are out of the system's memory; disk, cached: the same files read
just before. One request at a time, one token each; all in turn, length by length, with prompts of their own in each
turn. A ratio is the time of computing over that of finding, in the same turn; medians and quartiles.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import model as models
import torch

from twofold.engine.config import EngineConfig
from twofold.engine.engine import Engine
from twofold.engine.request import Request
from twofold.engine.sampling import SamplingParams
from twofold.models import load
from twofold.models.decoder import Decoder
from twofold.platforms import usable_cores

PLACES = ("pool", "host", "disk", "disk, cached")
ROOM = 1 << 30


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
    parser.add_argument("--model", choices=sorted(models.MODELS), default="reference")
    parser.add_argument("--models", type=Path, default=models.PLACE, help="where the models are written to")
    parser.add_argument("--lengths", default="32,64,128,256,512,1024,2048", help="tokens of the prompts")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--kv-dtype", default="auto", help="what keys and values are kept in")
    parser.add_argument("--threads", type=int, default=usable_cores(), help="default: all cores")
    parser.add_argument("--directory", type=Path, help="where the files go: on the disk to be measured")
    parser.add_argument("--quick", action="store_true", help="the small model, few lengths and turns")
    parser.add_argument("--json", type=Path, help="write the record to this file")
    parser.add_argument("--find", help=argparse.SUPPRESS)  # what the new process is to ask for
    args = parser.parse_args()
    if args.quick:
        args.model, args.lengths, args.turns = "quick", "64,256,1024", 2
    return args


def prompt_of(turn: int, length: int, vocab: int) -> tuple[int, ...]:
    """A prompt that shares nothing with others from its first block on."""
    return tuple((turn * 7919 + length * 31 + j * 104_729) % vocab for j in range(length))


def engine_of(decoder: Decoder, tokens: int, kv_dtype: str, **settings: Any) -> Engine:
    """An engine whose pool has room for one prompt of `tokens` tokens and a little."""
    blocks = tokens // 16 + 8
    dials = {"max_num_seqs": 4, "max_model_len": tokens + 64, "num_blocks": blocks, "kv_dtype": kv_dtype}
    return Engine(decoder, EngineConfig(**{**dials, **settings}))


def first_token(engine: Engine, prompt: tuple[int, ...], name: str) -> tuple[float, int]:
    """Seconds from the request to its first token, and how many tokens were found."""
    request = Request(id=name, prompt_ids=prompt, params=SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True))
    began = time.perf_counter()
    engine.submit(request)
    while not any(output.tokens for output in engine.step()):
        pass
    return time.perf_counter() - began, request.num_cached


class Places:
    """The engines that a turn asks, on one set of weights."""

    def __init__(self, decoder: Decoder, folder: Path, longest: int, kv_dtype: str) -> None:
        self.vocab = decoder.spec.vocab
        self.warm = engine_of(decoder, 4 * longest, kv_dtype, max_model_len=longest + 64)
        self.small = engine_of(decoder, longest, kv_dtype, kv_host_bytes=ROOM, kv_offload_dir=str(folder))

    def here(self, turn: int, length: int) -> dict[str, float]:
        """Seconds to the first token: computed, found in the pool, found in host memory."""
        prompt = prompt_of(turn, length, self.vocab)
        name = f"{turn}-{length}"
        computed, found = first_token(self.warm, prompt, f"{name}-computed")
        assert found == 0, "somebody has seen this prompt"
        took = {"computed": computed, "pool": self._found(self.warm, prompt, f"{name}-pool")}
        first_token(self.small, prompt, f"{name}-first")
        while self.small.has_work:
            self.small.step()  # until its blocks are written
        pool, tiers = self.small.pool, self.small.tiers
        assert tiers is not None
        pool.release(pool.allocate(pool.available))  # it forgets everything
        tiers.flush()
        took["host"] = self._found(self.small, prompt, f"{name}-host")
        return took

    @staticmethod
    def _found(engine: Engine, prompt: tuple[int, ...], name: str) -> float:
        seconds, found = first_token(engine, prompt, name)
        assert found == (len(prompt) - 1) // 16 * 16, f"{found} of {len(prompt)} tokens were found"
        return seconds


def forget_files(folder: Path) -> None:
    """Have the system forget the files' contents."""
    os.sync()
    for path in folder.rglob("*.kv"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def opened(args: argparse.Namespace) -> Decoder:
    torch.set_num_threads(args.threads)
    return load(models.make(args.model, args.models), dtype=torch.bfloat16)


def find(args: argparse.Namespace) -> None:
    """The new process: ask for prompts that another one computed, and print the seconds."""
    asked = json.loads(args.find)
    decoder = opened(args)
    began = time.perf_counter()
    engine = engine_of(decoder, asked["longest"], args.kv_dtype, kv_offload_dir=asked["folder"])
    opening = time.perf_counter() - began
    first_token(engine, prompt_of(-1, 64, decoder.spec.vocab), "warm up")
    took = {}
    for length in asked["lengths"]:
        prompt = prompt_of(asked["turn"], length, decoder.spec.vocab)
        took[length] = Places._found(engine, prompt, f"found-{length}")
    bytes_read = engine.stats().tiers["disk"]["loaded_bytes"]
    print(json.dumps({"took": took, "opening": opening, "bytes": bytes_read}))


def in_new_process(args: argparse.Namespace, asked: dict[str, Any]) -> dict[str, Any]:
    flags = ["--model", args.model, "--models", str(args.models), "--threads", str(args.threads)]
    command = [sys.executable, __file__, *flags, "--kv-dtype", args.kv_dtype, "--find", json.dumps(asked)]
    said = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    found: dict[str, Any] = json.loads(said.splitlines()[-1])
    return found


def show(took: dict[int, dict[str, list[float]]]) -> None:
    print(f"{'tokens':>7} {'computed ms':>12} " + " ".join(f"{place + ' ms':>16} {'times':>18}" for place in PLACES))
    for length, by in took.items():
        line = f"{length:7} {statistics.median(by['computed']) * 1e3:12.1f} "
        for place in PLACES:
            ratios = sorted(c / s for c, s in zip(by["computed"], by[place], strict=True))
            low, high = ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]
            spread = f"{statistics.median(ratios):.1f} [{low:.1f}, {high:.1f}]"
            line += f"{statistics.median(by[place]) * 1e3:16.1f} {spread:>18} "
        print(line)
    for place in PLACES[1:]:
        pays = [n for n, by in took.items() if statistics.median(by[place]) < statistics.median(by["computed"])]
        print(f"{place}: pays from {min(pays)} tokens on" if pays else f"{place}: never pays here")


def main() -> int:
    args = arguments()
    if args.find:
        find(args)
        return 0
    lengths = [int(length) for length in args.lengths.split(",")]
    took: dict[int, dict[str, list[float]]] = {n: {place: [] for place in ("computed", *PLACES)} for n in lengths}
    decoder = opened(args)
    opening = []
    with tempfile.TemporaryDirectory(dir=args.directory) as folder:
        places = Places(decoder, Path(folder), max(lengths), args.kv_dtype)
        first_token(places.warm, prompt_of(-1, 64, places.vocab), "warm up")
        for turn in range(args.turns):
            for length in lengths:
                for place, seconds in places.here(turn, length).items():
                    took[length][place].append(seconds)
            time.sleep(2.0)  # the last of the queue is written
            asked = {"turn": turn, "lengths": lengths, "longest": max(lengths), "folder": folder}
            for place in PLACES[2:]:
                if place == "disk":
                    forget_files(Path(folder))
                found = in_new_process(args, asked)
                opening.append(found["opening"])
                for length in lengths:
                    took[length][place].append(found["took"][str(length)])
        stored = places.small.stats().tiers["disk"]["stored_bytes"]
        places.small.close()
    show(took)
    print(f"opening the tier, weights read for their identity: {statistics.median(opening):.2f} s")
    if args.json:
        record = {"model": args.model, "threads": args.threads, "kv_dtype": args.kv_dtype, "seconds": took}
        args.json.write_text(json.dumps(record | {"opening": opening, "stored_bytes": stored}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
