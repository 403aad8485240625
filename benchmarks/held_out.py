"""What a model still knows: its loss on texts that the bundled recipes hold out, and what another one's is.

    twofold bench held_out [--model DIR] [--against DIR] [--source FILE] [--limit 60] [--json FILE]

Nats a token, the mean over documents: files of the standard library, questions about functions that no chat described
with the answers that the library's own documentation gives, and the little talk of chat.jsonl; or all documents of one
source. Differences are paired, document by document, with the 95% interval of a bootstrap over documents.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from twofold.align.estimates import Interval, bootstrap, verdict
from twofold.commands.model import model_dir
from twofold.data import ChatTemplate, Tokenizer, Wording, documents
from twofold.models.decoder import Decoder
from twofold.models.packed import PackedContext
from twofold.models.weights import load

TALK = Path(__file__).resolve().parents[1] / "recipes" / "pybot" / "chat.jsonl"
SOURCES = {"source code": "python-stdlib", "questions": "python-docs", "talk": str(TALK)}
FRACTION = 0.02
"""The share of documents that recipes/pybot/pretrain.toml and chat.toml hold out."""
LONGEST, PIECES = 512, 4
"""Tokens that are read at once, and how many times so many of a document, from its beginning."""


def losses(decoder: Decoder, wording: Wording, source: str, fraction: float, limit: int) -> Iterator[float]:
    """The mean loss of what is learned in each of the first `limit` held-out documents."""
    held = (it for it in documents(source) if it.held_out(fraction))
    for document in islice(held, limit):
        ids, learn = wording.document(document, source)
        found = list[Tensor]()
        for start in range(0, min(len(ids), PIECES * LONGEST), LONGEST):
            ids_T, learn_T = (torch.tensor(it[start : start + LONGEST]) for it in (ids, learn))
            rows_R = learn_T[1:].nonzero().squeeze(1)
            hidden_TD = decoder(ids_T, PackedContext([len(ids_T)]))
            found.append(-decoder.logprobs(hidden_TD[rows_R], ids_T[rows_R + 1]).double())
        whole_R = torch.cat(found)
        if len(whole_R):
            yield float(whole_R.mean())


@torch.no_grad()
def measure(folder: Path, source: str | None, limit: int) -> dict[str, list[float]]:
    """Every source's losses, by document; of a source that is named all are held out."""
    decoder = load(folder, dtype=torch.float32)
    wording = Wording(Tokenizer.load(folder), ChatTemplate.load(folder))
    if source:
        return {Path(source).stem: list(losses(decoder, wording, source, 1.0, limit))}
    return {name: list(losses(decoder, wording, place, FRACTION, limit)) for name, place in SOURCES.items()}


def compare(found: dict[str, list[float]], other: dict[str, list[float]] | None) -> dict[str, dict[str, Any]]:
    """The figures of each source, with a paired difference where there is another model."""
    record: dict[str, dict[str, Any]] = {}
    for name, values in found.items():
        record[name] = {"documents": len(values), "loss": told(bootstrap(values))}
        if other:
            less = bootstrap([before - now for now, before in zip(values, other[name], strict=True)])
            record[name] |= {"less": told(less), "verdict": verdict(less, len(values))}
    return record


def told(interval: Interval) -> dict[str, float]:
    return {name: round(getattr(interval, name), 4) for name in ("value", "low", "high")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a checkpoint directory; the bundled model without it")
    parser.add_argument("--against", help="another one; differences are told")
    parser.add_argument("--source", help="a file or a named source, all of it held out, in place of the recipes' own")
    parser.add_argument("--limit", type=int, default=60, help="documents of each source at most")
    parser.add_argument("--json", type=Path, help="write the figures there")
    args = parser.parse_args()
    found = measure(model_dir(args.model), args.source, args.limit)
    other = measure(model_dir(args.against), args.source, args.limit) if args.against else None
    record = compare(found, other)
    for name, row in record.items():
        loss = "{value:.3f} ({low:.3f} to {high:.3f})".format(**row["loss"])
        less = ", less by {value:+.3f} ({low:+.3f} to {high:+.3f})".format(**row["less"]) if other else ""
        line = f"{name:<20} {row['documents']:>3} documents: {loss} nats a token{less} {row.get('verdict', '')}"
        print(line.rstrip())
    if args.json:
        args.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
