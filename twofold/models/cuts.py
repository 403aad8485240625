"""How tensor parallel ranks divide a model: which rows or columns of each parameter, and whether that is possible.

A rank's decoder is a Decoder of a smaller spec: fewer heads, a narrower feed-forward, a part of the vocabulary
(Shoeybi et al. 2019). Nothing of the model is told apart from that.

    qkv [q | k | v, D]        rows     q0 k0 v0 to rank 0, q1 k1 v1 to rank 1        norms, router     whole
    out [D, q]                columns                                               out, down biases  rank 0 alone
    gate_up [gate | up, D]    rows     g0 u0, g1 u1
    down [D, W]               columns
    embed, head [V, D]        rows     uneven where the vocabulary is
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..core import ConfigError
from .spec import Attention, Ffn, LayerSpec, Mixture, ModelSpec


@dataclass(frozen=True, slots=True)
class Cut:
    """A parameter divided along `dim`: each of its `segments` (fused parts, end to end) among all ranks.

    `segments` empty: every rank has the whole. `first`: rank 0 has the whole, the others nothing.
    """

    dim: int = 0
    segments: tuple[int, ...] = ()
    first: bool = False

    def spans(self, ranks: int, rank: int) -> list[slice]:
        """What of the whole, along `dim`, is this rank's, in the order in which it lies there."""
        out, start = [], 0
        for size in self.segments:
            each = -(-size // ranks)
            out.append(slice(start + min(size, rank * each), start + min(size, rank * each + each)))
            start += size
        return out


WHOLE = Cut()


def cuts(spec: ModelSpec) -> dict[str, Cut]:
    """The cut of every parameter that is not whole on every rank, by the decoder's name."""
    found = {"embed.weight": Cut(0, (spec.vocab,))}
    if spec.head and not spec.head.tied:
        found |= {"head.weight": Cut(0, (spec.vocab,)), "head.bias": Cut(0, (spec.vocab,))}
    for index, layer in enumerate(spec.layers):
        parts = _attention(layer.mixer) | _ffn(layer.ffn)
        found |= {f"layers.{index}.{name}": cut for name, cut in parts.items()}
    return found


def _attention(mixer: Attention) -> dict[str, Cut]:
    fused = Cut(0, (mixer.q_width, mixer.kv_width, mixer.kv_width))
    parts = {
        "qkv.weight": fused,
        "qkv.bias": fused,
        "out.weight": Cut(1, (mixer.q_width,)),
        "out.bias": Cut(first=True),
    }
    if mixer.qk_norm == "per_head":
        for name, heads in (("q_norm", mixer.heads), ("k_norm", mixer.kv_heads)):
            parts |= {f"{name}.weight": Cut(0, (heads,)), f"{name}.bias": Cut(0, (heads,))}
    return parts


def _ffn(ffn: Ffn) -> dict[str, Cut]:
    if isinstance(ffn, Mixture):
        both = (ffn.width, ffn.width)
        parts = {"experts.gate_up.weight": Cut(1, both), "experts.down.weight": Cut(2, (ffn.width,))}
        if ffn.shared_width:
            shared = (ffn.shared_width, ffn.shared_width)
            parts |= {"shared.gate_up.weight": Cut(0, shared), "shared.down.weight": Cut(1, (ffn.shared_width,))}
        return parts
    width, fused = Cut(0, (ffn.width,)), Cut(0, (ffn.width, ffn.width))
    return {
        "up.weight": width,
        "up.bias": width,
        "gate_up.weight": fused,
        "gate_up.bias": fused,
        "down.weight": Cut(1, (ffn.width,)),
        "down.bias": Cut(first=True),
    }


def local_spec(spec: ModelSpec, ranks: int, rank: int) -> ModelSpec:
    """The smaller model that one rank of `ranks` holds.

    Raises:
        ConfigError: heads or widths do not divide; it names the nearest number of ranks that would do.
    """
    if reason := why_not(spec, ranks):
        legal = [n for n in range(1, spec.layers[0].mixer.heads + 1) if not why_not(spec, n)]
        nearest = min(legal, key=lambda n: (abs(n - ranks), n))
        raise ConfigError(f"parallel.tp = {ranks} cannot be: {reason}; the nearest that can is {nearest}")
    rows = cuts(spec)["embed.weight"].spans(ranks, rank)[0]
    return replace(spec, vocab=rows.stop - rows.start, layers=tuple(_local(layer, ranks) for layer in spec.layers))


def why_not(spec: ModelSpec, ranks: int) -> str | None:
    """Why a model cannot be divided so; None when it can."""
    if ranks == 1:
        return None
    for index, layer in enumerate(spec.layers):
        for name, size in _divided(layer):
            if size % ranks:
                return f"layer {index} has {size} {name}, which {ranks} ranks cannot share evenly"
        if layer.mixer.qk_norm == "full":
            return f"layer {index} normalises queries over all heads together, which no rank sees"
    if spec.vocab < ranks:
        return f"the vocabulary has only {spec.vocab} ids"
    return None


def _divided(layer: LayerSpec) -> list[tuple[str, int]]:
    found = [("query heads", layer.mixer.heads), ("key-value heads", layer.mixer.kv_heads)]
    if isinstance(layer.ffn, Mixture):
        return [*found, ("numbers in an expert", layer.ffn.width), ("in the shared one", layer.ffn.shared_width or 0)]
    return [*found, ("numbers in the feed-forward", layer.ffn.width)]


def _local(layer: LayerSpec, ranks: int) -> LayerSpec:
    mixer = replace(
        layer.mixer,
        heads=layer.mixer.heads // ranks,
        kv_heads=layer.mixer.kv_heads // ranks,
        scale=layer.mixer.scale if layer.mixer.scale is not None else layer.mixer.head_dim**-0.5,
    )
    ffn: Ffn = replace(layer.ffn, width=layer.ffn.width // ranks)
    if isinstance(ffn, Mixture) and ffn.shared_width:
        ffn = replace(ffn, shared_width=ffn.shared_width // ranks)
    return replace(layer, mixer=mixer, ffn=ffn)
