"""The mixed workload: many requests at once, prompts and outputs of very different lengths, the same for every engine.

48 requests, prompts uniform 16 to 512 tokens, outputs uniform 8 to 128, lengths fixed by a seed; token ids at random,
EOS ignored. It is scaled down in a stated way where it would not fit: fewer requests on fewer than four cores, shorter
lengths for a model with a shorter context. Nothing here imports an engine.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

REQUESTS, PROMPT, OUTPUT = 48, (16, 512), (8, 128)


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Token ids of each prompt, the length of each output, and in words how this was scaled from the full workload."""

    prompts: tuple[tuple[int, ...], ...]
    outputs: tuple[int, ...]
    scaled: str

    @property
    def tokens_in(self) -> int:
        return sum(map(len, self.prompts))

    @property
    def tokens_out(self) -> int:
        return sum(self.outputs)


def mixed(*, vocab: int, context: int, cores: int, turn: int, requests: int | None = None) -> Workload:
    """The mixed workload for a model and a machine. `turn` draws fresh tokens, never other lengths."""
    lengths = random.Random(20240)
    count = requests or (REQUESTS if cores >= 4 else REQUESTS * cores // 4)
    shrink = min(1.0, context / (PROMPT[1] + OUTPUT[1]))
    drawn = [(lengths.randint(*PROMPT), lengths.randint(*OUTPUT)) for _ in range(count)]
    sizes = [(max(4, int(p * shrink)), max(2, int(o * shrink))) for p, o in drawn]
    tokens = random.Random(f"turn {turn}")
    low = min(256, vocab // 2)  # below are bytes and special tokens in most vocabularies
    notes = [] if count == REQUESTS else [f"{count} requests instead of {REQUESTS}"]
    notes += [f"lengths times {shrink:.2f}, for a context of {context}"] if shrink < 1.0 else []
    return Workload(
        prompts=tuple(tuple(tokens.randrange(low, vocab) for _ in range(p)) for p, _ in sizes),
        outputs=tuple(o for _, o in sizes),
        scaled=", ".join(notes) or "not scaled",
    )
