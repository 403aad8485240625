"""What clients send and when: lengths of prompts and answers, arrivals, and the texts themselves; all from one seed.

    fixed      every prompt and answer of one length: the scenarios of the vLLM and DeepSpeed note (2023)
    random     uniform between (1 - ratio) and (1 + ratio) times a length
    sharegpt   log-normal with the means that the PagedAttention paper gives for ShareGPT: 161 in, 338 out
    fastgen    normal around a mean, deviation 0.3 of it: DeepSpeed-FastGen's prompts and answers

Arrivals are a Poisson process, or a gamma one: `burstiness` is the shape, below 1 more in bursts, above 1 more even.
As in vLLM's benchmark the gaps are stretched so that all requests are sent in requests / rate seconds.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass

LEAST = 4  # tokens of a prompt or an answer, at the least
SPREAD_IN, SPREAD_OUT = 1.1, 0.8  # of the logarithm of ShareGPT's lengths; the means are the paper's, these are ours
WORDS = (
    "the",
    "of",
    "and",
    "to",
    "in",
    "is",
    "that",
    "it",
    "was",
    "for",
    "on",
    "are",
    "as",
    "with",
    "his",
    "they",
    "at",
)

Pair = tuple[int, int]
SCENARIOS: dict[str, tuple[Pair, ...]] = {
    "long": ((2600, 60), (2600, 128), (2600, 200)),
    "others": ((500, 150), (500, 500), (500, 1024)),
}
"""Prompt and answer lengths of "Notes on vLLM v.s. DeepSpeed-FastGen": long prompts, short answers; and the rest."""


@dataclass(frozen=True, kw_only=True)
class Ask:
    """One request: token ids, or words of about as many tokens; how many are wanted; when it is sent, in seconds."""

    prompt: tuple[int, ...] | str
    tokens_out: int
    at: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """How long prompts and answers are. `input_len` and `output_len` are means, or the length itself."""

    kind: str = "random"
    input_len: int = 1024
    output_len: int = 128
    range_ratio: float = 0.0

    def draw(self, count: int, rng: random.Random, context: int) -> tuple[list[Pair], float]:
        """`count` pairs, and by how much all were shrunk to fit a context of so many tokens (1: not at all)."""
        kinds: dict[str, Callable[[random.Random], tuple[float, float]]] = {
            "fixed": lambda rng: (self.input_len, self.output_len),
            "random": lambda rng: (self._uniform(rng, self.input_len), self._uniform(rng, self.output_len)),
            "sharegpt": _sharegpt,
            "fastgen": lambda rng: (_normal(rng, self.input_len), _normal(rng, self.output_len)),
        }
        pairs = [kinds[self.kind](rng) for _ in range(count)]
        longest = max(prompt + answer for prompt, answer in pairs)
        shrink = min(1.0, (context - 1) / longest)
        return [(max(LEAST, int(p * shrink)), max(LEAST, int(o * shrink))) for p, o in pairs], shrink

    def _uniform(self, rng: random.Random, mean: int) -> float:
        return rng.uniform(mean * (1 - self.range_ratio), mean * (1 + self.range_ratio))


KINDS = ("fixed", "random", "sharegpt", "fastgen")


def _sharegpt(rng: random.Random) -> tuple[float, float]:
    """vLLM's filter: 4 to 1,024 tokens in, at most 2,048 in all."""
    while True:
        prompt, answer = _lognormal(rng, 161, SPREAD_IN), _lognormal(rng, 338, SPREAD_OUT)
        if 4 <= prompt <= 1024 and answer >= 4 and prompt + answer <= 2048:
            return prompt, answer


def _lognormal(rng: random.Random, mean: float, spread: float) -> float:
    return rng.lognormvariate(math.log(mean) - spread * spread / 2, spread)


def _normal(rng: random.Random, mean: float) -> float:
    return min(max(rng.gauss(mean, 0.3 * mean), LEAST), 4000)


def arrivals(count: int, rate: float, burstiness: float, rng: random.Random) -> list[float]:
    """When each of `count` requests is sent; all at once when `rate` (requests a second) is infinite."""
    if math.isinf(rate):
        return [0.0] * count
    gaps = [rng.gammavariate(burstiness, 1 / (rate * burstiness)) for _ in range(count)]
    stretch = count / rate / sum(gaps)
    at, times = 0.0, []
    for gap in gaps:
        at += gap * stretch
        times.append(at)
    return times


def asks(pairs: list[Pair], times: list[float], rng: random.Random, vocab: int | None) -> list[Ask]:
    """Requests with random ids below `vocab`, or with words when it is None: no two share a beginning."""
    made = []
    for (tokens_in, tokens_out), at in zip(pairs, times, strict=True):
        prompt: tuple[int, ...] | str
        if vocab is None:
            prompt = " ".join(rng.choice(WORDS) for _ in range(tokens_in))
        else:
            prompt = tuple(rng.randrange(min(256, vocab // 2), vocab) for _ in range(tokens_in))
        made.append(Ask(prompt=prompt, tokens_out=tokens_out, at=at))
    return made
