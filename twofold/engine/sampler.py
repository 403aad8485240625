"""Sampler: from the model's logits to tokens, in one fixed order, each row by itself and each draw by its own key.

    logits ─▶ allowed ids ─▶ logit bias ─▶ bans (min_tokens) ─▶ repetition ─▶ frequency ─▶ presence ─▶ greedy: argmax
                                                                                                    └▶ temperature
         token ◀─ inverse CDF at u ◀─ top-p, of what is left ◀─ top-k ◀─ min-p ◀─ softmax ◀────────────┘

- u is a hash of (seed, sample, position): a seeded request has the same text whatever else runs, wherever it resumes.
- A cut keeps every token that is as likely as the last one kept, so ties never depend on how a sort went.
- Equal logits: greedy takes the lowest id, and `top` lists lower ids first.
- "raw" log-probabilities are of the model's logits, "processed" ones of the distribution drawn from.
- A row works on its own numbers alone, in an order that depends on nothing else; rows are batched for speed only.

Shapes: R rows, V vocabulary, k alternatives.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from hashlib import blake2b

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels.triton import missing
from .plan import Draw
from .request import TokenOut

NUMBERS_AT_ONCE = 1 << 22
"""Logits of one tile of rows; bounds the sampler's scratch memory to about 100 MB."""

STRIP = 256
"""Tokens whose mass is summed first when one is drawn: a running sum over a whole vocabulary is slow."""


def uniform(seed: int, sample: int, position: int) -> float:
    """A number in [0, 1) that is a function of its three keys and of nothing else."""
    key = struct.pack("<QQQ", seed % 2**64, sample, position)
    return (int.from_bytes(blake2b(key, digest_size=8, person=b"twofold.draw").digest(), "little") >> 11) * 2.0**-53


def sample(logits_RV: Tensor, draws: Sequence[Draw]) -> list[TokenOut | str]:
    """Choose a token for each row of fp32 logits [R, V]; a string says why a row has none."""
    rows = max(1, NUMBERS_AT_ONCE // max(1, logits_RV.shape[1]))
    out: list[TokenOut | str] = []
    for start in range(0, len(draws), rows):
        out += _sample(logits_RV[start : start + rows], draws[start : start + rows])
    return out


def score(logits_RV: Tensor, targets: Sequence[int], num_top: int) -> list[TokenOut]:
    """The raw log-probability of each row's target, its rank, and the `num_top` best alternatives."""
    logprobs_RV = torch.log_softmax(logits_RV.float(), -1)
    return _report(logprobs_RV, torch.tensor(targets, device=logits_RV.device), [num_top] * len(targets))


def _sample(logits_RV: Tensor, draws: Sequence[Draw]) -> list[TokenOut | str]:
    low_R, high_R = torch.aminmax(logits_RV, dim=-1)
    finite = (torch.isfinite(low_R) & torch.isfinite(high_R)).tolist()
    errors = {row: "the model's logits are not finite" for row, good in enumerate(finite) if not good}
    if errors:
        logits_RV = logits_RV.clone()
        logits_RV[list(errors)] = 0.0
    x_RV = _edited(logits_RV, draws)
    if x_RV is not logits_RV:
        for row, best in enumerate(x_RV.amax(-1).tolist()):
            if best == -torch.inf:
                errors.setdefault(row, "no token is left to choose: allowed_token_ids are all banned by min_tokens")
                x_RV[row] = 0.0
    ids_R = torch.empty(len(draws), dtype=torch.int64, device=logits_RV.device)
    greedy = [row for row, draw in enumerate(draws) if draw.params.greedy]
    random = [row for row, draw in enumerate(draws) if not draw.params.greedy]
    if greedy:
        ids_R[greedy] = _rows(x_RV, greedy).argmax(-1)
    if random:
        chosen = [draws[row] for row in random]
        ids_R[random] = _chosen(_rows(x_RV, random), chosen)
    tokens = _with_logprobs(logits_RV, x_RV, ids_R, draws)
    return [errors.get(row, token) for row, token in enumerate(tokens)]


def _chosen(x_RV: Tensor, draws: Sequence[Draw]) -> Tensor:
    """One token for each row that is not greedy: on CUDA by one kernel, which makes the same choice."""
    if not x_RV.is_cuda or missing():
        return _pick(_distribution(x_RV, draws), draws)
    from ..kernels.triton.sampling import draw

    def column(name: str, dtype: torch.dtype) -> Tensor:
        return torch.tensor([getattr(each.params, name) for each in draws], dtype=dtype).to(x_RV.device)

    u = torch.tensor([uniform(each.seed, each.sample, each.position) for each in draws], dtype=torch.float64)
    return draw(
        x_RV,
        temperature_R=column("temperature", torch.float32),
        min_p_R=column("min_p", torch.float32),
        top_k_R=column("top_k", torch.int32),
        top_p_R=column("top_p", torch.float64),
        uniform_R=u.to(x_RV.device),
    )


def _rows(x_RV: Tensor, rows: list[int]) -> Tensor:
    return x_RV if len(rows) == x_RV.shape[0] else x_RV[rows]


# ---------------------------------------------------------------------------------- logits, row by row where asked for
def _edited(logits_RV: Tensor, draws: Sequence[Draw]) -> Tensor:
    """Logits after allowed ids, bias, bans and penalties; the same tensor when no row asks for any."""
    out = logits_RV
    for row, draw in enumerate(draws):
        edits = [edit for wanted, edit in _EDITS if wanted(draw)]
        if edits and out is logits_RV:
            out = logits_RV.clone()
        for edit in edits:
            edit(out[row], draw)
    return out


def _allow(x_V: Tensor, draw: Draw) -> None:
    ids = torch.tensor(draw.params.allowed_token_ids, device=x_V.device)
    kept = x_V[ids]
    x_V.fill_(-torch.inf)
    x_V[ids] = kept


def _bias(x_V: Tensor, draw: Draw) -> None:
    bias = draw.params.logit_bias
    ids = torch.tensor(list(bias), device=x_V.device)
    x_V[ids] += torch.tensor(list(bias.values()), dtype=x_V.dtype, device=x_V.device)


def _ban(x_V: Tensor, draw: Draw) -> None:
    x_V[torch.tensor(draw.banned, device=x_V.device)] = -torch.inf


def _repetition(x_V: Tensor, draw: Draw) -> None:
    """Divide the logits of tokens in prompt or output if positive, multiply them if not (CTRL, Keskar et al. 2019)."""
    ids = torch.tensor((*draw.prompt_ids, *draw.output_ids), device=x_V.device).unique()
    seen = x_V[ids]
    penalty = draw.params.repetition_penalty
    x_V[ids] = torch.where(seen > 0, seen / penalty, seen * penalty)


def _frequency_and_presence(x_V: Tensor, draw: Draw) -> None:
    """Lower the logits of tokens in the output, by their count and once (OpenAI)."""
    ids, counts = torch.tensor(draw.output_ids, device=x_V.device).unique(return_counts=True)
    x_V[ids] = x_V[ids] - draw.params.frequency_penalty * counts - draw.params.presence_penalty


def _counts_output(draw: Draw) -> bool:
    return bool(draw.output_ids) and bool(draw.params.frequency_penalty or draw.params.presence_penalty)


_EDITS: tuple[tuple[Callable[[Draw], bool], Callable[[Tensor, Draw], None]], ...] = (
    (lambda draw: draw.params.allowed_token_ids is not None, _allow),
    (lambda draw: bool(draw.params.logit_bias), _bias),
    (lambda draw: bool(draw.banned), _ban),
    (lambda draw: draw.params.repetition_penalty != 1.0, _repetition),
    (_counts_output, _frequency_and_presence),
)


# ---------------------------------------------------------------------------------- the distribution and a draw from it
def _distribution(x_RV: Tensor, draws: Sequence[Draw]) -> Tensor:
    """Weights [R, V] fp32 of the tokens that temperature, min-p, top-k and top-p leave; 0 for the others."""
    temperature_R1 = _column([draw.params.temperature for draw in draws], x_RV)
    p_RV = torch.softmax(x_RV / temperature_R1, -1)
    vocab = p_RV.shape[1]
    if any(draw.params.min_p > 0 for draw in draws):
        floor_R1 = _column([draw.params.min_p for draw in draws], x_RV) * p_RV.amax(-1, keepdim=True)
        p_RV = p_RV.masked_fill_(p_RV < floor_R1, 0.0)
    by_k = [row for row, draw in enumerate(draws) if 0 < draw.params.top_k < vocab]
    if by_k:
        k_R1 = torch.tensor([[draws[row].params.top_k] for row in by_k], device=p_RV.device)
        part_RV = _rows(p_RV, by_k)
        floor_R1 = part_RV.topk(int(k_R1.max()), -1).values.gather(1, k_R1 - 1)
        p_RV[by_k] = part_RV.masked_fill(part_RV < floor_R1, 0.0)
    by_p = [row for row, draw in enumerate(draws) if draw.params.top_p < 1.0]
    if by_p:
        part_RV = _rows(p_RV, by_p)
        floor_R1 = _nucleus_floor(part_RV, [draws[row].params.top_p for row in by_p])
        p_RV[by_p] = part_RV.masked_fill(part_RV < floor_R1, 0.0)
    return p_RV


def _nucleus_floor(p_RV: Tensor, top_p: list[float]) -> Tensor:
    """The weight [R, 1] of the last token of the smallest set with `top_p` of a row's mass (Holtzman et al. 2020).

    Sums run from the heaviest token down, one after another, so that looking at more of them changes nothing.
    """
    rows, vocab = p_RV.shape
    wanted_R1 = torch.tensor(top_p, dtype=torch.float64, device=p_RV.device)[:, None] * _strips(p_RV)[1][:, -1:]
    floor_R1 = torch.empty(rows, 1, dtype=p_RV.dtype, device=p_RV.device)
    todo, size = list(range(rows)), min(64, vocab)
    while todo:
        heavy_Rk = _rows(p_RV, todo).topk(size, -1).values
        sums_Rk = heavy_Rk.cumsum(-1, dtype=torch.float64)
        at_R1 = torch.searchsorted(sums_Rk, wanted_R1[todo])
        floor_R1[todo] = heavy_Rk.gather(1, at_R1.clamp(max=size - 1))
        todo = [] if size == vocab else [row for row, at in zip(todo, at_R1[:, 0].tolist()) if at == size]
        size = min(8 * size, vocab)
    return floor_R1


def _pick(p_RV: Tensor, draws: Sequence[Draw]) -> Tensor:
    """One token for each row, where its cumulative weight first exceeds u of the whole: first the strip, then in it."""
    strips_RSN, sums_RS = _strips(p_RV)
    u = [[uniform(draw.seed, draw.sample, draw.position)] for draw in draws]
    aim_R1 = torch.tensor(u, dtype=torch.float64, device=p_RV.device) * sums_RS[:, -1:]
    strip_R1 = _first_beyond(sums_RS, aim_R1)
    before_R1 = torch.where(strip_R1 > 0, sums_RS.gather(1, (strip_R1 - 1).clamp(min=0)), 0.0)
    inner_RN = strips_RSN.gather(1, strip_R1[:, :, None].expand(-1, 1, STRIP))[:, 0].cumsum(-1, dtype=torch.float64)
    return (strip_R1 * STRIP + _first_beyond(inner_RN, aim_R1 - before_R1))[:, 0]


def _strips(p_RV: Tensor) -> tuple[Tensor, Tensor]:
    """Weights in strips [R, S, STRIP], zeros at the end, and the cumulative mass of strips [R, S] in float64."""
    rows, vocab = p_RV.shape
    strips_RSN = F.pad(p_RV, (0, -vocab % STRIP)).view(rows, -1, STRIP)
    return strips_RSN, strips_RSN.sum(-1, dtype=torch.float64).cumsum(-1)


def _first_beyond(sums_RN: Tensor, aim_R1: Tensor) -> Tensor:
    """Where growing sums first exceed `aim`; at the latest where they reach their end, which rounding may make it."""
    end_R1 = sums_RN[:, -1:].contiguous()
    return torch.minimum(torch.searchsorted(sums_RN, aim_R1, right=True), torch.searchsorted(sums_RN, end_R1))


def _column(values: list[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device)[:, None]


# ---------------------------------------------------------------------------------- log-probabilities
def _with_logprobs(logits_RV: Tensor, x_RV: Tensor, ids_R: Tensor, draws: Sequence[Draw]) -> list[TokenOut]:
    tokens = [TokenOut(token) for token in ids_R.tolist()]
    for mode in ("raw", "processed"):
        rows = [
            row
            for row, draw in enumerate(draws)
            if draw.params.logprobs is not None and draw.params.logprobs_mode == mode
        ]
        if not rows:
            continue
        chosen = [draws[row] for row in rows]
        source_RV = _rows(logits_RV, rows) if mode == "raw" else _processed(_rows(x_RV, rows), chosen)
        counts = [draw.params.logprobs or 0 for draw in chosen]
        for row, token in zip(rows, _report(torch.log_softmax(source_RV, -1), ids_R[rows], counts)):
            tokens[row] = token
    return tokens


def _processed(x_RV: Tensor, draws: Sequence[Draw]) -> Tensor:
    """Logits whose softmax is the distribution drawn from; for a greedy row, the edited logits as they are."""
    random = [row for row, draw in enumerate(draws) if not draw.params.greedy]
    if not random:
        return x_RV
    out_RV = x_RV.clone()
    chosen = [draws[row] for row in random]
    part_RV = x_RV[random]
    scaled_RV = part_RV / _column([draw.params.temperature for draw in chosen], x_RV)
    out_RV[random] = scaled_RV.masked_fill(_distribution(part_RV, chosen) == 0.0, -torch.inf)
    return out_RV


def _report(logprobs_RV: Tensor, ids_R: Tensor, counts: list[int]) -> list[TokenOut]:
    """Each row's token with its log-probability, its rank from 1, and `counts[row]` alternatives of finite weight."""
    own_R1 = logprobs_RV.gather(1, ids_R[:, None])
    ranks = ((logprobs_RV > own_R1).sum(-1) + 1).tolist()
    tops: list[list[tuple[float, int]]] = [[] for _ in counts]
    most = min(max(counts, default=0), logprobs_RV.shape[1])
    if most:
        last_R1 = torch.tensor([[min(count, most)] for count in counts], device=logprobs_RV.device) - 1
        floor_R1 = logprobs_RV.topk(most, -1).values.gather(1, last_R1.clamp(min=0))
        good_RV = (logprobs_RV >= floor_R1) & (logprobs_RV > -torch.inf) & (last_R1 >= 0)
        rows, ids = torch.where(good_RV)
        for row, token, value in zip(rows.tolist(), ids.tolist(), logprobs_RV[rows, ids].tolist()):
            tops[row].append((-value, token))
    own = own_R1[:, 0].tolist()
    out = []
    for row, token in enumerate(ids_R.tolist()):
        top = tuple((other, -negated) for negated, other in sorted(tops[row])[: counts[row]])
        out.append(TokenOut(token, own[row], ranks[row], top))
    return out
