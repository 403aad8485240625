"""Attention and rotary positions inside a transformers module's own forward, which asks for both by name.

The forward stays the module's: projections, norms of queries and keys, its cache. Only two of the names that it looks
up in its file are others: the turn of queries and keys, and the choice of attention. Nothing outside this module's
forward changes, nor any other model of the same file.

Shapes: B sequences, H query heads, K key-value heads, L queries, S keys, D head size, R pairs turned.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ...kernels.attention import KEYS, Attend
from ...kernels.paged import Panels, Spans, keep, paged_attention
from ...kernels.rope import rotate
from .proof import BOUNDS, apart
from .reading import Piece, read

TURN, CHOICE = "apply_rotary_pos_emb", "ALL_ATTENTION_FUNCTIONS"


class Look:
    """Our attention as transformers calls one. A single query goes to the model's own, and so does what we cannot do.

    `other` counts the latter, by reason.
    """

    def __init__(self) -> None:
        self.other: dict[str, int] = {}
        self._read: list[tuple[Tensor | None, tuple[object, ...], list[Piece] | None]] = []

    def __call__(
        self,
        own: Callable[..., Any],
        module: nn.Module,
        query_BHLD: Tensor,
        key_BKSD: Tensor,
        value_BKSD: Tensor,
        attention_mask: Tensor | None,
        **how: Any,
    ) -> tuple[Tensor, Tensor | None]:
        if (
            query_BHLD.shape[2] == 1
        ):  # one token behind a cache: a pass over memory, which no kernel of ours makes shorter
            alone: tuple[Tensor, Tensor | None] = own(module, query_BHLD, key_BKSD, value_BKSD, attention_mask, **how)
            return alone
        why, pieces = self._why_not(module, query_BHLD, key_BKSD, value_BKSD, attention_mask, how)
        if pieces is None:
            self.other[why] = self.other.get(why, 0) + 1
            theirs: tuple[Tensor, Tensor | None] = own(module, query_BHLD, key_BKSD, value_BKSD, attention_mask, **how)
            return theirs
        scale = how.get("scaling")
        attend = Attend(
            scale=float(query_BHLD.shape[-1] ** -0.5 if scale is None else scale),
            window=how.get("sliding_window"),
            softcap=how.get("softcap"),
        )
        return looked(query_BHLD, key_BKSD, value_BKSD, pieces, attend, how.get("s_aux")), None

    def _why_not(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, how: dict[str, Any]
    ) -> tuple[str, list[Piece] | None]:
        """Why this call is not for us, or how its sequences lie."""
        causal = how.get("is_causal")
        if not (getattr(module, "is_causal", True) if causal is None else causal):
            return "it looks both ways", None
        if how.get("dropout"):
            return "it drops scores", None
        if how.get("output_attentions") or how.get("head_mask") is not None:
            return "the scores themselves were asked for", None
        if query.shape[-1] != value.shape[-1]:
            return "values are of another size than keys", None
        if torch.is_grad_enabled() and query.requires_grad:
            return "a gradient is wanted", None
        return "the mask is not that of texts which look back", self._pieces(
            query, key, mask, how.get("sliding_window")
        )

    def _pieces(self, query: Tensor, key: Tensor, mask: Tensor | None, window: int | None) -> list[Piece] | None:
        """What a mask says; layers share one mask, or two when some have a window."""
        version = 0 if mask is None or mask.is_inference() else mask._version
        known = (version, query.shape, key.shape, window)
        for seen, of, pieces in self._read:
            if seen is mask and of == known:
                return pieces
        batch, _, queries, _ = query.shape
        pieces = read(mask, batch, queries, key.shape[2], window)
        self._read = [*self._read[-1:], (mask, known, pieces)]
        return pieces


def looked(
    q_BHLD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, pieces: list[Piece], how: Attend, sinks_H: Tensor | None = None
) -> Tensor:
    """Each sequence over its own past: [B, L, H, D]; a query that is padding gets zeros."""
    B, H, L, D = q_BHLD.shape
    whole, asked, used = [], [], 0
    for piece in pieces:
        tokens = piece.end - piece.pad
        blocks = range(used, used + -(-tokens // KEYS))
        used = blocks.stop
        whole.append((0, tokens, blocks))
        asked.append((tokens - piece.count, piece.count, blocks))
    panels = Panels.zeros(used, k_BKSD.shape[1], KEYS, D)
    k_TKD, v_TKD = (
        torch.cat([x[b, :, p.pad : p.end].transpose(0, 1) for b, p in enumerate(pieces)]).float()
        for x in (k_BKSD, v_BKSD)
    )
    keep(k_TKD, v_TKD, panels, Spans(whole, KEYS))
    q_THD = torch.cat([q_BHLD[b, :, p.first : p.first + p.count].transpose(0, 1) for b, p in enumerate(pieces)])
    out_THD = paged_attention(q_THD.float(), panels, Spans(asked, KEYS), how, sinks_H)
    if all(piece.count == L for piece in pieces):
        return out_THD.view(B, L, H, D).to(q_BHLD.dtype)
    out_BLHD = q_BHLD.new_zeros(B, L, H, D)
    at = 0
    for row, piece in enumerate(pieces):
        out_BLHD[row, piece.first : piece.first + piece.count] = out_THD[at : at + piece.count].to(q_BHLD.dtype)
        at += piece.count
    return out_BLHD


@dataclass(frozen=True)
class Turn:
    """A file's apply_rotary_pos_emb: q [B, H, L, D], angles [B or 1, L, R or 2R].

    Angles come doubled as two halves or each twice, or once; pairs are the halves (i, i + R) or neighbours.
    """

    angles: str
    interleaved: bool
    own: Callable[..., tuple[Tensor, Tensor]] | None = None
    """The file's function, which turns a single token with less to prepare."""

    def __call__(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
        if self.own is not None and q.shape[2 if unsqueeze_dim == 1 else 1] == 1:
            return self.own(q, k, cos, sin, unsqueeze_dim=unsqueeze_dim)
        return self._turned(q, cos, sin, unsqueeze_dim == 1), self._turned(k, cos, sin, unsqueeze_dim == 1)

    def _turned(self, x: Tensor, cos: Tensor, sin: Tensor, heads_first: bool) -> Tensor:
        x_BLHD = x.transpose(1, 2) if heads_first else x
        B, L, H, D = x_BLHD.shape
        cos_TR, sin_TR = (self._once(a).expand(B, L, -1).reshape(B * L, -1).float() for a in (cos, sin))
        flat = x_BLHD.reshape(B * L, H, D).float()
        made = rotate(flat, cos_TR, sin_TR, self.interleaved).view(B, L, H, D).to(x.dtype)
        return made.transpose(1, 2) if heads_first else made

    def _once(self, angles: Tensor) -> Tensor:
        if self.angles == "halves":
            return angles[..., : angles.shape[-1] // 2]
        return angles[..., ::2] if self.angles == "twice" else angles


TURNS = (Turn("halves", False), Turn("once", False), Turn("twice", True), Turn("once", True), Turn("halves", True))


def turn_of(theirs: Callable[..., Any], head_dim: int, dtype: torch.dtype) -> Turn | None:
    """The one of ours that gives what a file's own function gives, None when none does."""
    draw = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, heads, 3, head_dim, generator=draw).to(dtype) for heads in (4, 2))
    once = torch.rand(2, 3, head_dim // 2, generator=draw)
    shapes = {"halves": once.repeat(1, 1, 2), "once": once, "twice": once.repeat_interleave(2, -1)}
    for ours in TURNS:
        cos, sin = (f(shapes[ours.angles]).to(dtype) for f in (torch.cos, torch.sin))
        try:
            with torch.no_grad():
                pairs = zip(ours(q, k, cos, sin), theirs(q, k, cos, sin), strict=True)
                alike = all(apart(a, b) <= BOUNDS.get(dtype, 0.0) for a, b in pairs)
        except Exception:  # other arguments, or angles of another shape
            continue
        if alike:
            return replace(ours, own=theirs)
    return None


def own_names(module: nn.Module, look: Look) -> tuple[dict[str, Any] | None, str]:
    """The names that a module's forward will find instead of its file's, or why it cannot be given any."""
    forward = getattr(type(module).forward, "__wrapped__", type(module).forward)
    code = getattr(forward, "__code__", None)
    if code is None or CHOICE not in code.co_names:
        return None, "its forward does not choose its attention by name"
    found = forward.__globals__
    names: dict[str, Any] = {CHOICE: _Choice(found[CHOICE], look)}
    head_dim = next((d for name in ("head_dim", "head_size") if isinstance(d := getattr(module, name, None), int)), 0)
    weight = next(module.parameters(), None)
    if TURN in code.co_names and head_dim and weight is not None:
        ours = turn_of(found[TURN], head_dim, weight.dtype)
        names |= {} if ours is None else {TURN: ours}
    return names, ""


class _Choice:
    """Stands for a file's ALL_ATTENTION_FUNCTIONS: whatever is asked for, it is ours, with that one behind it."""

    def __init__(self, theirs: Any, look: Look) -> None:
        self._theirs, self._look = theirs, look

    def get_interface(self, name: str, default: Callable[..., Any]) -> Callable[..., Any]:
        return self._ours(self._theirs.get_interface(name, default))

    def __getitem__(self, name: str) -> Callable[..., Any]:
        return self._ours(self._theirs[name])

    def _ours(self, own: Callable[..., Any]) -> Callable[..., Any]:
        return lambda module, *args, **how: self._look(own, module, *args, **how)


def rebind(module: nn.Module, names: dict[str, Any]) -> None:
    """Let a module's forward look up `names` before those of its file; the code itself is the same."""
    forward = getattr(type(module).forward, "__wrapped__", type(module).forward)
    own = types.FunctionType(
        forward.__code__, {**forward.__globals__, **names}, forward.__name__, forward.__defaults__, forward.__closure__
    )
    own.__kwdefaults__ = forward.__kwdefaults__
    module.forward = types.MethodType(own, module)
