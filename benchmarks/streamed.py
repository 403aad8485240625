"""How fast is a model that is three times larger than the memory its process may take, against its disk?

    twofold bench streamed [--quick] [--json FILE] [--directory DIR] [--threads N] [--dtype NAME] [--turns N]

A random checkpoint is made. A process of its own sets a limit on the memory that it may take beyond what its libraries
already have (RLIMIT_DATA: private memory, mapped or from the heap; a third of the checkpoint), packs the checkpoint's
layers into a file, and continues 64 prompts with layers streamed from there. In the same process and of the same file,
the disk's bandwidth is measured: whole, in the same pieces, past the system's cache, by one, two and four threads, the
best counts. Beside it the same runs with all weights in memory: with the limit, which must fail, and without, which
must tell the same tokens with the same log-probabilities, bit for bit.

What cannot be shown from inside: caches of the disk itself, and of the host of a virtual machine. The file lies in none
of this system's (mincore is asked after the run).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import limits
import model
import torch
from streamed_run import REQUESTS

from twofold.core import TwofoldError
from twofold.models import Decoder, save, spec_from
from twofold.platforms import team_size
from twofold.train.init import init_weights

MIB = 1 << 20
TIMES = 3
FULL = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 20, "num_attention_heads": 8}
QUICK = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 14, "num_attention_heads": 4}
VOCAB = 8192


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
    parser.add_argument("--quick", action="store_true", help="a checkpoint of some tens of MiB and one turn")
    parser.add_argument("--json", type=Path, help="write the record to this file")
    parser.add_argument("--directory", type=Path, help="where the files are (default: the system's for temporary ones)")
    parser.add_argument("--threads", type=int, default=team_size(), help="threads that compute")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of the checkpoint")
    parser.add_argument("--turns", type=int, default=3, help="how often the batch runs (default: 3)")
    return parser.parse_args()


def make(folder: Path, quick: bool, dtype: torch.dtype) -> int:
    """Write a random checkpoint with its tokenizer; its bytes."""
    vocab = 1024 if quick else VOCAB
    sizes = {"vocab_size": vocab, "num_key_value_heads": 1 if quick else 2, "head_dim": 64 if quick else 128}
    config = model.MODELS["quick"] | (QUICK if quick else FULL) | sizes
    decoder = Decoder(spec_from(config), dtype=dtype)
    init_weights(decoder, seed=0)
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            for ending, gain in model.LOUD.items():
                if name.endswith(ending):
                    parameter.mul_(gain)
    save(decoder, folder, config=config)
    (folder / "tokenizer.json").write_text(json.dumps(model.tokenizer(vocab)))
    said = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": model.END, "pad_token": model.END}
    (folder / "tokenizer_config.json").write_text(json.dumps(said))
    return (folder / "model.safetensors").stat().st_size


def run(how: dict[str, Any], **more: Any) -> dict[str, Any]:
    """One run in a process of its own."""
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("streamed_run.py"))],
        input=json.dumps(how | more),
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": str(how["threads"])},
    )
    if done.returncode:
        raise SystemExit(f"a run ended with status {done.returncode}")
    record: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return record


def main() -> None:
    args = arguments()
    machine = limits.measure(args.threads, quick=True)
    print(limits.line(machine))
    with tempfile.TemporaryDirectory(dir=args.directory, prefix="streamed-") as place:
        folder = Path(place) / "model"
        size = make(folder, args.quick, getattr(torch, args.dtype))
        limit = size // TIMES
        how = {"model": str(folder), "offload": str(Path(place) / "offload"), "threads": args.threads}
        how |= {"prompt": 8, "new": 8} if args.quick else {"prompt": 16, "new": 32}
        how |= {"batches": [REQUESTS] if args.quick else [1, 8, REQUESTS]}
        how |= {"turns": 1 if args.quick else args.turns, "dtype": args.dtype}
        print(f"checkpoint {size / MIB:,.0f} MiB, {args.dtype}; the limit {limit / MIB:,.0f} MiB beyond the libraries'")
        refused = run(how, limit=limit, weights="resident").get("lacked", "FITS, WHICH IT SHOULD NOT")
        print(f"{'in memory, limited':22} {refused}", flush=True)
        free = run(how, limit=0, weights="resident")
        tell("in memory, no limit", free)
        streamed = run(how, limit=limit, weights="stream")
    if "lacked" in streamed:
        raise SystemExit(f"streamed under the limit: {streamed['lacked']}")
    tell("streamed, limited", streamed, free)
    same = streamed.pop("told") == free.pop("told")
    print(
        f"{streamed['kept']} of {streamed['layers']} layers stay; the disk gives {streamed['disk'] / MIB:,.0f} MiB/s "
        f"{streamed['way']}\n{streamed['private'] / MIB:,.0f} MiB taken at most of {limit / MIB:,.0f}; "
        f"{streamed['cached'] / MIB:,.1f} MiB of the file in the system's cache; "
        f"{'same tokens, same bits' if same else 'OTHER TOKENS'}"
    )
    record = {"limits": machine, "checkpoint": size, "limit": limit, "threads": args.threads, "dtype": args.dtype}
    record |= {"refused": refused, "in_memory": free, "streamed": streamed, "same_bits": same}
    if args.json:
        args.json.write_text(json.dumps(record, indent=1) + "\n")
    if not same or refused.startswith("FITS"):
        raise SystemExit("the streamed model is not the one in memory, or the limit limits nothing")


def tell(way: str, found: dict[str, Any], base: dict[str, Any] | None = None) -> None:
    """A line for each batch of a run: its tokens a second, and of a streamed one what it had of the disk."""
    for number, row in enumerate(found["batches"]):
        rates = [row["tokens"] / seconds for seconds in row["seconds"]]
        line = f"{way:20} {row['requests']:3} requests {median(rates):8,.1f} tokens/s "
        line += f"({min(rates):,.1f} to {max(rates):,.1f})"
        if base is not None:
            row["of_resident"] = median(base["batches"][number]["seconds"]) / median(row["seconds"])
            speed = median(read / seconds for read, seconds in zip(row["read"], row["seconds"]))
            row["share"] = speed / found["disk"]
            waited = median(waited / seconds for waited, seconds in zip(row["waited"], row["seconds"]))
            line += (
                f", {row['of_resident']:.2f} times in memory\n{'':33} {row['read'][-1] / row['tokens'] / MIB:,.1f} MiB "
                f"read a token, {speed / MIB:,.0f} MiB/s: {row['share']:.0%} of the disk's; {waited:.0%} of the time "
                "waits for it"
            )
        print(line, flush=True)


if __name__ == "__main__":
    try:
        main()
    except TwofoldError as error:
        raise SystemExit(str(error)) from None
