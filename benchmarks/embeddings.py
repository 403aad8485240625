"""How many texts a second become embeddings, against transformers' padded batches of the same checkpoint?

    twofold bench embeddings [--texts N] [--quick] [--json FILE] [--peer-python PYTHON]

A BERT of MiniLM's shape (6 layers of 384) with random weights, texts of mixed lengths (8 to 256 tokens, most of them
short), fp32 and the mean of all tokens on both sides, in turn A B A B. Padding is what a batch of mixed lengths costs;
the peer chooses its best batch size, for texts as they come and for texts sorted by length, which
sentence-transformers does where it has them all at once. A server has not.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from throughput import peer_python
from turns import Runner, Spread, loaded, use_threads

from twofold import EngineConfig
from twofold.engine.pooler import Pooler
from twofold.engine.pooling import PoolingEngine
from twofold.engine.request import Request
from twofold.engine.sampling import SamplingParams
from twofold.engine.vectors import Pooling
from twofold.models import Decoder, load, save, spec_from
from twofold.models.sentences import Sentences
from twofold.platforms import team_size

CONFIG = {
    "architectures": ["BertModel"],
    "model_type": "bert",
    "vocab_size": 30_522,
    "hidden_size": 384,
    "num_hidden_layers": 6,
    "num_attention_heads": 12,
    "intermediate_size": 1536,
    "max_position_embeddings": 512,
    "type_vocab_size": 2,
}
SIZES = (8, 16, 32, 64)
ORDERS = {"arrival": "as they come", "sorted": "sorted by length"}
ALIKE = 1e-4
"""The most that a number of a vector of length 1 may differ between the two."""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
    parser.add_argument("--texts", type=int, help="how many texts (default: 256)")
    parser.add_argument("--threads", type=int, default=team_size(), help="threads of each side")
    parser.add_argument("--turns", type=int, default=5, help="how often each side runs (default: 5)")
    parser.add_argument("--quick", action="store_true", help="24 texts, one turn, one batch size: a smoke test")
    parser.add_argument("--json", type=Path, help="write the record to this file")
    parser.add_argument("--peer-python", help="python that has transformers (default: this one, when it has)")
    parser.add_argument("--no-peer", action="store_true", help="measure Twofold alone")
    return parser.parse_args()


def texts_of(count: int, turn: int) -> list[list[int]]:
    """Fresh ids in each turn, the same lengths always: a log-normal of median 40, from 8 to 256."""
    lengths, ids = random.Random(7), random.Random(turn)
    sizes = [min(max(int(lengths.lognormvariate(3.7, 0.8)), 8), 256) for _ in range(count)]
    return [[ids.randrange(1000, CONFIG["vocab_size"]) for _ in range(size)] for size in sizes]  # type: ignore[call-overload]


def checkpoint(folder: Path) -> Path:
    """The model, made on the spot."""
    decoder = Decoder(spec_from(CONFIG))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
            if "norm" in name and name.endswith("weight"):
                parameter.add_(1.0)
    save(decoder, folder, config=CONFIG)
    return folder


class Ours:
    """Twofold's pooling engine on token ids."""

    def __init__(self, model: Path) -> None:
        decoder = load(model)
        config = EngineConfig(dtype="float32", runner="pooling")
        self.engine = PoolingEngine(decoder, config, Pooler(decoder, Sentences(pooling="mean")))

    def run(self, texts: list[list[int]]) -> tuple[float, list[list[float]]]:
        """Seconds for all texts, there at once, and their vectors."""
        found: dict[str, list[float]] = {}
        start = time.perf_counter()
        for i, ids in enumerate(texts):
            asked = Pooling(task="embed")
            self.engine.submit(
                Request(id=str(i), prompt_ids=tuple(ids), params=SamplingParams(), pooling=asked, seed=0)
            )
        while self.engine.has_work:
            for output in self.engine.step():
                assert output.pooled is not None, output.error
                found[output.request_id] = output.pooled.numbers()
        return time.perf_counter() - start, [found[str(i)] for i in range(len(texts))]


def ask(peer: Runner, texts: list[list[int]], batch: int, order: str) -> dict[str, Any]:
    peer.send({"texts": texts, "batch": batch, "order": order})
    return peer.answer()


def choose(peer: Runner, texts: list[list[int]], quick: bool) -> dict[str, int]:
    """The peer's fastest batch size in each order."""
    sizes = SIZES[:1] if quick else SIZES
    ask(peer, texts, sizes[0], "arrival")  # its first run warms up
    best = {}
    for order, words in ORDERS.items():
        timed = {size: float(ask(peer, texts, size, order)["seconds"]) for size in sizes}
        best[order] = min(timed, key=lambda size: timed[size])
        rates = ", ".join(f"{size}: {len(texts) / seconds:,.0f}" for size, seconds in timed.items())
        print(f"  peer, {words}, texts/s by batch size  {rates}", flush=True)
    return best


def main() -> None:
    args = arguments()
    count, turns = (24, 1) if args.quick else (args.texts or 256, args.turns)
    use_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        model = checkpoint(Path(folder) / "bert")
        first = texts_of(count, 0)
        tokens = sum(map(len, first))
        print(
            f"BERT of 6 layers of 384, fp32, {args.threads} threads, {count} texts of {tokens / count:.0f} tokens each"
        )
        ours = Ours(model)
        ours.run(first)
        python = peer_python(args)
        peer = loaded("transformers_embed.py", python, model, args.threads) if python else None
        best = choose(peer, first, args.quick) if peer else {}
        seconds: dict[str, list[float]] = {"twofold": [], **{order: [] for order in best}}
        apart = 0.0
        for turn in range(1, turns + 1):
            texts = texts_of(count, turn)
            took, vectors = ours.run(texts)
            seconds["twofold"].append(took)
            for order, size in best.items():
                assert peer is not None
                answer = ask(peer, texts, size, order)
                seconds[order].append(float(answer["seconds"]))
                apart = max(apart, (torch.tensor(vectors) - torch.tensor(answer["tokens"])).abs().max().item())
        record = report(count, seconds, best, peer.name if peer else "", apart)
        if peer:
            peer.close()
    if args.json:
        args.json.write_text(json.dumps(record, indent=1) + "\n")
    if apart > ALIKE:
        raise SystemExit(f"the vectors differ by {apart:.1e}: these are not the same model")


def report(
    count: int, seconds: dict[str, list[float]], best: dict[str, int], name: str, apart: float
) -> dict[str, Any]:
    """Print the result and return it as a record."""
    rate = Spread.of([count / took for took in seconds["twofold"]])
    print(f"twofold       {rate.text('texts/s')}")
    record: dict[str, Any] = {"texts": count, "texts_s": rate.median}
    for order, size in best.items():
        other = Spread.of([count / took for took in seconds[order]])
        ratio = Spread.of([b / a for a, b in zip(seconds["twofold"], seconds[order], strict=True)])
        print(f"transformers  {other.text('texts/s')}; {ORDERS[order]}, batches of {size}; {name}")
        print(f"ratio         {ratio.text('times transformers', 2)}")
        record[order] = {"batch": size, "texts_s": other.median, "ratio": ratio.median, "ratio_least": ratio.least}
    if best:
        print(f"vectors       differ by {apart:.1e} at most")
        record |= {"peer": name, "apart": apart}
    return record


if __name__ == "__main__":
    main()
