"""Makes pairs and demonstrations, the JSONL beside this file, from answers of the model in `base`.

    for part in train valid; do
      twofold evaluate recipes/pybot/base recipes/pybot/tasks/tests.toml --samples 32 \
        --prompts recipes/pybot/tasks/tests.$part.jsonl --answers runs/pybot/answers.$part.jsonl
      python recipes/pybot/pairs.py runs/pybot/answers.$part.jsonl $part
    done

A pair is an answer that passes the tests of its function and one of the model's own that does not; a demonstration is
the reference solution. What the two parts ask has no function in common.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
MOST, OFTEN = 4, 8
"""Pairs of one prompt at most: of each kind that is balanced, and of its most frequent failures."""
Pair = tuple[str, str]
"""A solution and a failure."""


def pairs(row: dict[str, Any], part: str) -> list[Pair]:
    """Failures of one prompt, each beside the solution nearest in length.

    valid: as many of them shorter than their solution as longer, so that length alone is right in half of the pairs.
    train: those, and the most frequent ones, which the policy has to give up.
    """
    said = Counter((sample["text"], sample["reward"] == 1.0) for sample in row["samples"])
    good = list(dict.fromkeys([row["columns"]["answer"], *(text for text, passes in sorted(said) if passes)]))
    bad = {text: count for (text, passes), count in sorted(said.items()) if not passes and text.strip()}
    found = [(min(good, key=lambda text: abs(len(text) - len(other))), other) for other in bad]
    often = sorted(found, key=lambda pair: -bad[pair[1]])[:OFTEN] if part == "train" else []
    return list(dict.fromkeys(often + balanced(found)))


def balanced(found: list[Pair]) -> list[Pair]:
    """The pairs nearest in length: shorter failures, equally long ones, and as many longer ones as shorter."""
    near = sorted(found, key=lambda pair: abs(len(pair[0]) - len(pair[1])))
    short = [pair for pair in near if len(pair[1]) < len(pair[0])][:MOST]
    same = [pair for pair in near if len(pair[1]) == len(pair[0])][:MOST]
    long = [pair for pair in near if len(pair[1]) > len(pair[0])][: len(short)]
    return short + same + long


def write(path: Path, rows: list[dict[str, str]]) -> None:
    """One JSON object a line."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    print(f"{path.name}: {len(rows)} rows")


def main(answers: str, part: str) -> None:
    """Read what `twofold evaluate --answers` wrote, and write both files of one part."""
    asked = [json.loads(line) for line in Path(answers).read_text(encoding="utf-8").splitlines()]
    made = [
        {"prompt": row["prompt"], "chosen": chosen, "rejected": rejected}
        for row in asked
        for chosen, rejected in pairs(row, part)
    ]
    write(HERE / f"pairs.{part}.jsonl", made)
    shown = [{"prompt": row["prompt"], "completion": row["columns"]["answer"]} for row in asked]
    write(HERE / f"demonstrations.{part}.jsonl", shown)


if __name__ == "__main__":
    main(*sys.argv[1:])
