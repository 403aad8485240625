"""Sampler: from the model's logits to tokens; each draw by its own key.

- The order of edits, cuts and draws is written in `kernels/sample.py`, whose op does the work.
- u is a hash of (seed, sample, position): a seeded request has the same text whatever else runs, wherever it resumes.

Shapes: R rows, V vocabulary.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from hashlib import blake2b

from torch import Tensor

from ..kernels import sample as kernel
from .plan import Draw
from .request import TokenOut
from .sampling import SamplingParams

NUMBERS_AT_ONCE = 1 << 22
"""Logits of one tile of rows; bounds the sampler's scratch memory to about 100 MB."""


def uniform(seed: int, sample: int, position: int) -> float:
    """A number in [0, 1) that is a function of its three keys and of nothing else."""
    key = struct.pack("<QQQ", seed % 2**64, sample, position)
    return (int.from_bytes(blake2b(key, digest_size=8, person=b"twofold.draw").digest(), "little") >> 11) * 2.0**-53


def sample(
    logits_RV: Tensor, draws: Sequence[Draw], masks: Sequence[bytes | None] | None = None
) -> list[TokenOut | str]:
    """Choose a token for each row of fp32 logits [R, V]; a string says why a row has none.

    A mask has one bit for each id, in words of 32, lowest first: only ids whose bit is set can be chosen.
    """
    masks = masks if masks is not None else [None] * len(draws)
    rows = max(1, NUMBERS_AT_ONCE // max(1, logits_RV.shape[1]))
    out: list[TokenOut | str] = []
    for start in range(0, len(draws), rows):
        choices = _choices(draws[start : start + rows], masks[start : start + rows])
        for chosen in kernel.choose(logits_RV[start : start + rows], choices):
            out.append(chosen if isinstance(chosen, str) else TokenOut(*chosen))
    return out


def score(logits_RV: Tensor, targets: Sequence[int], num_top: int) -> list[TokenOut]:
    """The raw log-probability of each row's target, its rank, and the `num_top` best alternatives."""
    return [TokenOut(*chosen) for chosen in kernel.score(logits_RV, targets, num_top)]


def _choices(draws: Sequence[Draw], masks: Sequence[bytes | None]) -> list[kernel.Choice]:
    """What the kernel is asked; the same object for places of one greedy request that differ in nothing."""
    out = list[kernel.Choice]()
    before: SamplingParams | None = None
    for draw, mask in zip(draws, masks, strict=True):
        plain = mask is None and not (draw.banned or draw.output_ids or draw.prompt_ids)
        alike = draw.params if plain else None
        out.append(out[-1] if alike is not None and alike is before else _choice(draw, mask))
        before = alike if alike is not None and alike.greedy else None
    return out


def _choice(draw: Draw, mask: bytes | None) -> kernel.Choice:
    params = draw.params
    history = (*draw.prompt_ids, *draw.output_ids) if params.repetition_penalty != 1.0 else ()
    return kernel.Choice(
        temperature=0.0 if params.greedy else params.temperature,
        top_p=params.top_p,
        top_k=params.top_k,
        min_p=params.min_p,
        u=0.0 if params.greedy else uniform(draw.seed, draw.sample, draw.position),
        repetition=params.repetition_penalty,
        frequency=params.frequency_penalty,
        presence=params.presence_penalty,
        seen=history,
        counted=draw.output_ids,
        mask=mask,
        allowed=params.allowed_token_ids,
        bias=params.logit_bias,
        banned=draw.banned,
        report="beam" if draw.beams else None if params.logprobs is None else params.logprobs_mode,
        tops=draw.beams or params.logprobs or 0,
    )
