"""The workloads that every engine runs: token ids and lengths fixed by seeds, the same for all, EOS ignored.

    A   one request, prompt 32, 128 new tokens                    decode
    B   one prompt of 1,024, one new token                        prefill
    C   32 requests at once, 64 in, 64 out                        batched decode
    D   48 requests at once, prompts uniform 16 to 512, outputs uniform 8 to 128: the mixed workload
    E   32 requests that share 512 tokens, 16 of their own, 16 out; cold, then warm: the same 512, new ends

Scaled down in a stated way where it would not fit: fewer requests on fewer than four cores, shorter lengths for a model
with a shorter context. `turn` draws fresh tokens, never other lengths. Nothing here imports an engine.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

REQUESTS, PROMPT, OUTPUT = 48, (16, 512), (8, 128)


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Token ids of each prompt, the length of each output, and in words how this was scaled from the full workload.

    The first `shared` tokens are the same in all prompts, when that is what the workload is about.
    """

    prompts: tuple[tuple[int, ...], ...]
    outputs: tuple[int, ...]
    scaled: str = "not scaled"
    shared: int = 0

    @property
    def tokens_in(self) -> int:
        return sum(map(len, self.prompts))

    @property
    def tokens_out(self) -> int:
        return sum(self.outputs)

    def question(self) -> dict[str, object]:
        """What a runner is asked (peers/protocol.py)."""
        return {"prompts": self.prompts, "outputs": self.outputs, "shared": self.shared}

    def to_warm_up(self) -> Workload:
        """A few of its requests, two new tokens each: every shape of the work, little of its length."""
        few = max(1, len(self.prompts) // 4)
        return replace(self, prompts=self.prompts[:few], outputs=tuple(min(2, n) for n in self.outputs[:few]))


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How large the workloads are: the full ones, or a quarter of most things for `quick`."""

    cores: int
    vocab: int
    quick: bool = False

    @property
    def share(self) -> float:
        """The share of requests of C, D and E."""
        return min(1.0, self.cores / 4) / (4 if self.quick else 1)

    @property
    def shrink(self) -> float:
        """The share of lengths."""
        return 0.25 if self.quick else 1.0

    def told(self) -> str:
        notes = [f"requests of C, D and E times {self.share:g}"] if self.share < 1 else []
        notes += [f"lengths times {self.shrink:g}"] if self.shrink < 1 else []
        return ", ".join(notes) or "not scaled"

    def requests(self, full: int) -> int:
        return max(2, round(full * self.share))

    def length(self, full: int) -> int:
        return max(1, round(full * self.shrink))


NAMES = ("A", "B", "C", "D", "E")


def workload(name: str, turn: int | str, sizes: Sizes, *, ends: str = "") -> Workload:
    """One of NAMES. For E, `ends` other than "" keeps the turn's shared tokens and draws other ends."""
    lengths = {
        "A": [(32, sizes.length(128))],
        "B": [(sizes.length(1024), 1)],
        "C": [(sizes.length(64), sizes.length(64))] * sizes.requests(32),
        "D": [(sizes.length(p), sizes.length(o)) for p, o in mixed_lengths(sizes.requests(REQUESTS))],
        "E": [(16, sizes.length(16))] * sizes.requests(32),
    }[name]
    shared = sizes.length(512) if name == "E" else 0
    prefix = draw(random.Random(f"{name} {turn}"), shared, sizes.vocab)
    tokens = random.Random(f"{name} {turn} {ends}")
    return Workload(
        prompts=tuple(prefix + draw(tokens, p, sizes.vocab) for p, _ in lengths),
        outputs=tuple(o for _, o in lengths),
        scaled=sizes.told(),
        shared=shared,
    )


def mixed_lengths(count: int) -> list[tuple[int, int]]:
    """Prompt and output lengths of the mixed workload."""
    lengths = random.Random(20240)
    return [(lengths.randint(*PROMPT), lengths.randint(*OUTPUT)) for _ in range(count)]


def draw(tokens: random.Random, count: int, vocab: int) -> tuple[int, ...]:
    """Random ids; below `low` are bytes and special tokens in most vocabularies."""
    low = min(256, vocab // 2)
    return tuple(tokens.randrange(low, vocab) for _ in range(count))


def mixed(*, vocab: int, context: int, cores: int, turn: int, requests: int | None = None) -> Workload:
    """The mixed workload alone, for any model and machine."""
    count = requests or (REQUESTS if cores >= 4 else REQUESTS * cores // 4)
    shrink = min(1.0, context / (PROMPT[1] + OUTPUT[1]))
    sizes = [(max(4, int(p * shrink)), max(2, int(o * shrink))) for p, o in mixed_lengths(count)]
    tokens = random.Random(f"turn {turn}")
    notes = [] if count == REQUESTS else [f"{count} requests instead of {REQUESTS}"]
    notes += [f"lengths times {shrink:.2f}, for a context of {context}"] if shrink < 1.0 else []
    return Workload(
        prompts=tuple(draw(tokens, p, vocab) for p, _ in sizes),
        outputs=tuple(o for _, o in sizes),
        scaled=", ".join(notes) or "not scaled",
    )
