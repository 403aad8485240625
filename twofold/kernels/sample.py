"""From logits to tokens in one fixed order, each row by itself.

    logits ─▶ mask ─▶ allowed ids ─▶ bias ─▶ bans ─▶ repetition ─▶ frequency ─▶ presence ─▶ greedy: argmax
                                                                                         └▶ temperature
                  token ◀─ inverse CDF at u ◀─ top-p, of what is left ◀─ top-k ◀─ min-p ◀─ softmax ◀────┘

- A cut keeps every token that is as likely as the last one kept, so ties never depend on how a sort went.
- Equal logits: greedy takes the lowest id, and `top` lists lower ids first.
- "raw" log-probabilities are of the model's logits, "tempered" ones of these divided by the temperature (what a
  trainer can compute again), "processed" ones of the distribution drawn from.
- For a beam search (report "beam") edits are made to log-probabilities instead of logits, as transformers' processors
  are, and these are reported as they are, whatever they sum to.
- A row works on its own numbers alone, in an order that depends on nothing else; rows are batched for speed only.

Shapes: R rows, V vocabulary, k alternatives, S strips of STRIP tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple

import msgspec
import torch
import torch.nn.functional as F
from torch import Tensor

from . import native
from .op import op

STRIP = 256
"""Tokens whose mass is summed first when one is drawn: a running sum over a whole vocabulary is slow."""

NOT_FINITE = "the model's logits are not finite"
NOTHING_LEFT = "no token is left to choose: the grammar, allowed_token_ids and min_tokens leave none in common"


class Choice(msgspec.Struct, frozen=True, kw_only=True):
    """How one row's token is chosen. Temperature 0 is greedy; `u` in [0, 1) decides a draw; `top_k` 0 is off.

    `mask` has a bit for each id that may come, in little-endian words of 32; None: every id may.
    `seen` are the ids that the repetition penalty touches, `counted` those that frequency and presence count.
    `report` asks for log-probabilities, with `tops` alternatives.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    u: float = 0.0
    repetition: float = 1.0
    frequency: float = 0.0
    presence: float = 0.0
    seen: Sequence[int] = ()
    counted: Sequence[int] = ()
    mask: bytes | None = None
    allowed: Sequence[int] | None = None
    bias: Mapping[int, float] = msgspec.field(default_factory=dict)
    banned: Sequence[int] = ()
    report: Literal["raw", "tempered", "processed", "beam"] | None = None
    tops: int = 0


class Chosen(NamedTuple):
    """A token, and when asked for its log-probability, its rank from 1, and (id, log-probability) of the best."""

    id: int
    logprob: float | None = None
    rank: int | None = None
    top: tuple[tuple[int, float], ...] = ()


@op
def choose(logits_RV: Tensor, choices: Sequence[Choice]) -> list[Chosen | str]:
    """A token for each row of fp32 logits [R, V]; a string says why a row has none."""
    if not choices:
        return []
    low_R, high_R = torch.aminmax(logits_RV, dim=-1)
    finite = (torch.isfinite(low_R) & torch.isfinite(high_R)).tolist()
    errors = {row: NOT_FINITE for row, good in enumerate(finite) if not good}
    if errors:
        logits_RV = logits_RV.clone()
        logits_RV[list(errors)] = 0.0
    x_RV = _edited(_for_beams(logits_RV, choices), choices)
    if x_RV is not logits_RV:
        for row, best in enumerate(x_RV.amax(-1).tolist()):
            if best == -torch.inf:
                errors.setdefault(row, NOTHING_LEFT)
                x_RV[row] = 0.0
    ids_R = torch.empty(len(choices), dtype=torch.int64, device=logits_RV.device)
    greedy = [row for row, choice in enumerate(choices) if not choice.temperature]
    random = [row for row, choice in enumerate(choices) if choice.temperature]
    if greedy:
        ids_R[greedy] = _rows(x_RV, greedy).argmax(-1)
    if random:
        chosen = [choices[row] for row in random]
        ids_R[random] = draw(_rows(x_RV, random), chosen)
    tokens = _with_logprobs(logits_RV, x_RV, ids_R, choices)
    return [errors.get(row, token) for row, token in enumerate(tokens)]


@op
def draw(x_RV: Tensor, choices: Sequence[Choice]) -> Tensor:
    """Token ids [R] of rows that are not greedy, from logits that are edited already."""
    return _pick(_distribution(x_RV, choices), choices)


@op
def score(logits_RV: Tensor, ids: Sequence[int], tops: int) -> list[Chosen]:
    """The log-probability of each row's given token, its rank, and the `tops` best alternatives."""
    if not ids:
        return []
    logprobs_RV = torch.log_softmax(logits_RV.float(), -1)
    return _report(logprobs_RV, torch.tensor(ids, device=logits_RV.device), [tops] * len(ids))


@choose.on(
    "native", why="no sort: a cut is a floor found on a ladder of 2,048 rungs", missing=native.missing, bits="own"
)
def _choose(logits_RV: Tensor, choices: Sequence[Choice]) -> list[Chosen | str]:
    if not _fits(logits_RV):
        return choose.reference(logits_RV, choices)
    from .sample_native import choose_rows

    return choose_rows(logits_RV, choices)


@score.on("native", why="one pass for the sum, one for rank and alternatives", missing=native.missing, bits="own")
def _score(logits_RV: Tensor, ids: Sequence[int], tops: int) -> list[Chosen]:
    if not _fits(logits_RV):
        return score.reference(logits_RV, ids, tops)
    from .sample_native import score_rows

    return score_rows(logits_RV, ids, tops)


def _fits(logits_RV: Tensor) -> bool:
    return logits_RV.device.type == "cpu" and logits_RV.dtype == torch.float32 and logits_RV.stride(-1) == 1


def _rows(x_RV: Tensor, rows: list[int]) -> Tensor:
    return x_RV if len(rows) == x_RV.shape[0] else x_RV[rows]


# ---------------------------------------------------------------------------------- logits, row by row where asked for
def _edited(logits_RV: Tensor, choices: Sequence[Choice]) -> Tensor:
    """Logits after masks, allowed ids, bias, bans and penalties; the same tensor when no row asks for any."""
    out = logits_RV
    for row, choice in enumerate(choices):
        edits = [edit for wanted, edit in _EDITS if wanted(choice)]
        if edits and out is logits_RV:
            out = logits_RV.clone()
        for edit in edits:
            edit(out[row], choice)
    return out


def _for_beams(logits_RV: Tensor, choices: Sequence[Choice]) -> Tensor:
    """The same with log-probabilities in the rows of beams."""
    rows = [row for row, choice in enumerate(choices) if choice.report == "beam"]
    if not rows:
        return logits_RV
    out_RV = logits_RV.clone()
    out_RV[rows] = torch.log_softmax(logits_RV[rows], -1)
    return out_RV


def _mask(x_V: Tensor, choice: Choice) -> None:
    bits = torch.frombuffer(bytearray(choice.mask or b""), dtype=torch.uint8)[:, None] >> torch.arange(8)
    x_V[(bits & 1).view(-1)[: x_V.shape[0]].to(x_V.device) == 0] = -torch.inf


def _allow(x_V: Tensor, choice: Choice) -> None:
    ids = torch.tensor(list(choice.allowed or ()), device=x_V.device)
    kept = x_V[ids]
    x_V.fill_(-torch.inf)
    x_V[ids] = kept


def _bias(x_V: Tensor, choice: Choice) -> None:
    ids = torch.tensor(list(choice.bias), device=x_V.device)
    x_V[ids] += torch.tensor(list(choice.bias.values()), dtype=x_V.dtype, device=x_V.device)


def _ban(x_V: Tensor, choice: Choice) -> None:
    x_V[torch.tensor(list(choice.banned), device=x_V.device)] = -torch.inf


def _repetition(x_V: Tensor, choice: Choice) -> None:
    """Divide the logits of seen tokens if positive, multiply them if not (CTRL, Keskar et al. 2019)."""
    ids = torch.tensor(list(choice.seen), device=x_V.device).unique()
    seen = x_V[ids]
    x_V[ids] = torch.where(seen > 0, seen / choice.repetition, seen * choice.repetition)


def _frequency_and_presence(x_V: Tensor, choice: Choice) -> None:
    """Lower the logits of counted tokens, by their count and once (OpenAI)."""
    ids, counts = torch.tensor(list(choice.counted), device=x_V.device).unique(return_counts=True)
    x_V[ids] = x_V[ids] - choice.frequency * counts - choice.presence


_EDITS: tuple[tuple[Callable[[Choice], bool], Callable[[Tensor, Choice], None]], ...] = (
    (lambda choice: choice.mask is not None, _mask),
    (lambda choice: choice.allowed is not None, _allow),
    (lambda choice: bool(choice.bias), _bias),
    (lambda choice: bool(choice.banned), _ban),
    (lambda choice: choice.repetition != 1.0 and bool(choice.seen), _repetition),
    (lambda choice: bool(choice.counted) and bool(choice.frequency or choice.presence), _frequency_and_presence),
)


# ---------------------------------------------------------------------------------- the distribution and a draw from it
def _distribution(x_RV: Tensor, choices: Sequence[Choice]) -> Tensor:
    """Weights [R, V] fp32 of the tokens that temperature, min-p, top-k and top-p leave; 0 for the others."""
    temperature_R1 = _column([choice.temperature for choice in choices], x_RV)
    p_RV = torch.softmax(x_RV / temperature_R1, -1)
    vocab = p_RV.shape[1]
    if any(choice.min_p > 0 for choice in choices):
        floor_R1 = _column([choice.min_p for choice in choices], x_RV) * p_RV.amax(-1, keepdim=True)
        p_RV = p_RV.masked_fill_(p_RV < floor_R1, 0.0)
    by_k = [row for row, choice in enumerate(choices) if 0 < choice.top_k < vocab]
    if by_k:
        k_R1 = torch.tensor([[choices[row].top_k] for row in by_k], device=p_RV.device)
        part_RV = _rows(p_RV, by_k)
        floor_R1 = part_RV.topk(int(k_R1.max()), -1).values.gather(1, k_R1 - 1)
        p_RV[by_k] = part_RV.masked_fill(part_RV < floor_R1, 0.0)
    by_p = [row for row, choice in enumerate(choices) if choice.top_p < 1.0]
    if by_p:
        part_RV = _rows(p_RV, by_p)
        floor_R1 = _nucleus_floor(part_RV, [choices[row].top_p for row in by_p])
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


def _pick(p_RV: Tensor, choices: Sequence[Choice]) -> Tensor:
    """One token for each row, where its cumulative weight first exceeds u of the whole: first the strip, then in it."""
    strips_RSN, sums_RS = _strips(p_RV)
    u = [[choice.u] for choice in choices]
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
def _with_logprobs(logits_RV: Tensor, x_RV: Tensor, ids_R: Tensor, choices: Sequence[Choice]) -> list[Chosen]:
    tokens = [Chosen(token) for token in ids_R.tolist()]
    for mode in ("raw", "tempered", "processed", "beam"):
        rows = [row for row, choice in enumerate(choices) if choice.report == mode]
        if not rows:
            continue
        chosen = [choices[row] for row in rows]
        if mode in ("processed", "beam"):
            source_RV = _processed(_rows(x_RV, rows), chosen)
        else:
            source_RV = _rows(logits_RV, rows)
        if mode == "tempered":
            source_RV = source_RV / _column([choice.temperature or 1.0 for choice in chosen], logits_RV)
        counts = [choice.tops for choice in chosen]
        logprobs_RV = source_RV if mode == "beam" else torch.log_softmax(source_RV, -1)
        for row, token in zip(rows, _report(logprobs_RV, ids_R[rows], counts)):
            tokens[row] = token
    return tokens


def _processed(x_RV: Tensor, choices: Sequence[Choice]) -> Tensor:
    """Logits whose softmax is the distribution drawn from; for a greedy row, the edited logits as they are."""
    random = [row for row, choice in enumerate(choices) if choice.temperature]
    if not random:
        return x_RV
    out_RV = x_RV.clone()
    chosen = [choices[row] for row in random]
    part_RV = x_RV[random]
    scaled_RV = part_RV / _column([choice.temperature for choice in chosen], x_RV)
    out_RV[random] = scaled_RV.masked_fill(_distribution(part_RV, chosen) == 0.0, -torch.inf)
    return out_RV


def _report(logprobs_RV: Tensor, ids_R: Tensor, counts: list[int]) -> list[Chosen]:
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
        out.append(Chosen(token, own[row], ranks[row], top))
    return out
