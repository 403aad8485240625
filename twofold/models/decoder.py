"""Decoder: the one model, for training and for serving, built from a ModelSpec.

Tokens are one flat axis T: no padding and no batch axis. The context says which tokens belong together and where older
keys and values are. Every multiplication goes through `kernels/`, so a token's bits are the same in the trainer and the
server.

Shapes: T tokens, R rows whose logits are wanted, D hidden size, E embedding size, V vocabulary, H query heads,
K key-value heads, d head size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.errors import ConfigError
from ..kernels.activation import activate, gated, scaled
from ..kernels.attention import Attend
from ..kernels.blocksparse import Sparse
from ..kernels.entropy import entropy_of
from ..kernels.loss import logprobs_of, tempered
from ..kernels.moe import experts, open_gate, route
from ..kernels.quantized import quantized_experts
from ..kernels.rope import rotate
from ..quant.linear import QuantLinear
from .context import AttnContext
from .memory import give_memory
from .rope import Angles
from .spec import (
    Alibi,
    Ffn,
    Gated,
    Head,
    LayerSpec,
    Mixture,
    ModelSpec,
    Parallel,
    Plain,
    PostOutput,
    PostResidual,  # fmt: skip
    Pre,
    PreFfn,
    Rope,
    Sandwich,
)
from .tensors import Normalise, Weight

if TYPE_CHECKING:
    from .streaming import Stream

AnglesOf = dict[Rope, tuple[Tensor, Tensor]]


class Choice(nn.Module):
    """What a Mixture that is `biased` adds to its experts' probabilities when it chooses: fp32 in every model."""

    def __init__(self, experts: int) -> None:
        super().__init__()
        self.bias: Tensor
        self.register_buffer("bias", torch.zeros(1, experts))


class Experts(nn.Module):
    """The experts of a Mixture, a tensor for each of two products; `exchange` goes to those in other processes."""

    def __init__(self, spec: Mixture, hidden: int) -> None:
        super().__init__()
        self.spec = spec
        self.gate_up = Weight(spec.experts, 2 * spec.width, hidden)
        self.down = Weight(spec.experts, hidden, spec.width)
        self.exchange: Callable[[Experts, Tensor, Tensor, Tensor], Tensor] | None = None

    def forward(self, x_TD: Tensor, weights_TC: Tensor, experts_TC: Tensor) -> Tensor:
        if self.exchange is not None:
            return self.exchange(self, x_TD, weights_TC, experts_TC)
        return self.multiply(x_TD, weights_TC, experts_TC)

    def multiply(self, x_TD: Tensor, weights_TC: Tensor, experts_TC: Tensor) -> Tensor:
        """The weighted sum of each token's experts, of those that are here; a negative choice is none."""
        if isinstance(self.gate_up, QuantLinear) and isinstance(self.down, QuantLinear):
            return quantized_experts(x_TD, self.gate_up.packed, self.down.packed, weights_TC, experts_TC, self.spec.act)
        floats = self.gate_up.floats(), self.down.floats()  # one may be quantized already while the other is not
        return experts(x_TD, *floats, weights_TC, experts_TC, self.spec.act)


class SharedExpert(nn.Module):
    """The feed-forward that every token of a Mixture passes."""

    def __init__(self, width: int, act: str, hidden: int) -> None:
        super().__init__()
        self.act = act
        self.gate_up = Weight(2 * width, hidden)
        self.down = Weight(hidden, width)

    def forward(self, x_TD: Tensor) -> Tensor:
        out: Tensor = self.down(gated(self.gate_up(x_TD), self.act))
        return out


class Layer(nn.Module):
    """One LayerSpec: attention, feed-forward, the norms around them; of the parts below, those that the spec names."""

    norm1: Normalise
    norm2: Normalise
    norm3: Normalise
    norm4: Normalise
    q_norm: Normalise
    k_norm: Normalise
    routing: Callable[[Tensor, AttnContext], tuple[Tensor, Tensor]] | None  # a trainer's, in the place of `route`

    def __init__(self, index: int, spec: LayerSpec, hidden: int, max_len: int) -> None:
        super().__init__()
        self.index, self.spec, self.routing = index, spec, None
        mixer = spec.mixer
        width = mixer.q_width + 2 * mixer.kv_width
        self.qkv = Weight(width, hidden, bias=width if mixer.qkv_bias else 0)
        self.out = Weight(hidden, mixer.q_width, bias=hidden if mixer.out_bias else 0)
        if mixer.qk_norm and mixer.qk_norm_kind:
            for name, heads in (("q_norm", mixer.heads), ("k_norm", mixer.kv_heads)):
                self.add_module(name, Normalise(mixer.qk_norm_kind, *mixer.qk_norm_shape(heads)))
        self.attend = Attend(
            scale=mixer.scale if mixer.scale is not None else mixer.head_dim**-0.5,
            window=mixer.window,
            softcap=mixer.softcap,
            slopes=mixer.position.slopes(mixer.heads) if isinstance(mixer.position, Alibi) else None,
            sparse=Sparse(mixer.sparse, mixer.heads, max_len) if mixer.sparse else None,
            causal=mixer.causal,
        )
        self._add_ffn(spec.ffn, hidden)
        for number in spec.norm_numbers:
            self.add_module(f"norm{number}", Normalise(spec.norms.norm, hidden))

    def _add_ffn(self, ffn: Ffn, hidden: int) -> None:
        match ffn:
            case Gated(width=width, bias=bias):
                self.gate_up = Weight(2 * width, hidden, bias=2 * width if bias else 0)
                self.down = Weight(hidden, width, bias=hidden if bias else 0)
            case Plain(width=width, bias=bias):
                self.up = Weight(width, hidden, bias=width if bias else 0)
                self.down = Weight(hidden, width, bias=hidden if bias else 0)
            case Mixture() as mixture:
                self.router = Weight(mixture.experts, hidden)
                if mixture.biased:
                    self.choice = Choice(mixture.experts)
                self.experts = Experts(mixture, hidden)
                if mixture.shared_width:
                    self.shared = SharedExpert(mixture.shared_width, mixture.act, hidden)
                    if mixture.shared_gate:
                        self.shared_gate = Weight(1, hidden)

    def forward(self, x_TD: Tensor, ctx: AttnContext, angles: AnglesOf) -> Tensor:
        residual = self.spec.residual

        def add(x: Tensor, y: Tensor) -> Tensor:
            return x + (y if residual == 1.0 else y * residual)

        def attention(x: Tensor, norm: Normalise | None = None) -> Tensor:
            return self.attention(x, ctx, angles, norm)

        match self.spec.norms:
            case Pre():
                x_TD = add(x_TD, attention(x_TD, self.norm1))
                return add(x_TD, self.ffn(x_TD, ctx, self.norm2))
            case PreFfn():
                x_TD = add(x_TD, attention(x_TD))
                return add(x_TD, self.ffn(x_TD, ctx, self.norm2))
            case Parallel(shared=True):
                normed_TD = self.norm1(x_TD)
                return add(x_TD, attention(normed_TD) + self.ffn(normed_TD, ctx))
            case Parallel():
                return add(x_TD, attention(x_TD, self.norm1) + self.ffn(x_TD, ctx, self.norm2))
            case PostOutput():
                x_TD = add(x_TD, self.norm1(attention(x_TD)))
                return add(x_TD, self.norm2(self.ffn(x_TD, ctx)))
            case Sandwich():
                x_TD = add(x_TD, self.norm2(attention(x_TD, self.norm1)))
                return add(x_TD, self.norm4(self.ffn(x_TD, ctx, self.norm3)))
            case PostResidual():
                x_TD = self.norm1(add(x_TD, attention(x_TD)))
                out: Tensor = self.norm2(add(x_TD, self.ffn(x_TD, ctx)))
                return out

    def projected(self, x_TD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [T, H, d], keys and values [T, K, d], before any position is given them."""
        mixer = self.spec.mixer
        qkv = self.qkv(x_TD)
        if mixer.clip_qkv is not None:
            qkv = qkv.clamp(-mixer.clip_qkv, mixer.clip_qkv)
        q, k, v = qkv.split((mixer.q_width, mixer.kv_width, mixer.kv_width), -1)
        if mixer.qk_norm == "full":
            q, k = self.q_norm(q), self.k_norm(k)
        q_THd, k_TKd, v_TKd = (x.reshape(x.shape[0], -1, mixer.head_dim) for x in (q, k, v))
        if mixer.qk_norm in ("head", "per_head"):
            q_THd, k_TKd = self.q_norm(q_THd), self.k_norm(k_TKd)
        return q_THd, k_TKd, v_TKd

    def attention(self, x_TD: Tensor, ctx: AttnContext, angles: AnglesOf, norm: Normalise | None = None) -> Tensor:
        """What attention makes of hidden states [T, D], passed through `norm` first."""
        mixer = self.spec.mixer
        q_THd, k_TKd, v_TKd = self.projected(x_TD if norm is None else norm(x_TD))
        if isinstance(mixer.position, Rope):
            cos_TR, sin_TR = angles[mixer.position]
            q_THd = rotate(q_THd, cos_TR, sin_TR, mixer.position.interleaved)
            k_TKd = rotate(k_TKd, cos_TR, sin_TR, mixer.position.interleaved)
        mixed_THd = ctx.attend(self.index, q_THd, k_TKd, v_TKd, self.attend)
        return cast(Tensor, self.out(mixed_THd.flatten(1)))

    def ffn(self, x_TD: Tensor, ctx: AttnContext, norm: Normalise | None = None) -> Tensor:
        """What the feed-forward makes of hidden states [T, D], passed through `norm` first."""
        ffn = self.spec.ffn
        x_TD = x_TD if norm is None else norm(x_TD)
        out: Tensor
        if isinstance(ffn, Mixture):
            out = self.experts(x_TD, *(self.routing(x_TD, ctx) if self.routing else self.route(x_TD, ffn)))
            if ffn.shared_width and ffn.shared_gate:
                return open_gate(out, self.shared(x_TD), self.shared_gate(x_TD))
            return out + self.shared(x_TD) if ffn.shared_width else out
        inner = gated(self.gate_up(x_TD), ffn.act) if isinstance(ffn, Gated) else activate(self.up(x_TD), ffn.act)
        out = self.down(inner)
        return out

    def route(self, x_TD: Tensor, ffn: Mixture) -> tuple[Tensor, Tensor]:
        """Each token's experts and their weights, as a served model chooses: (weights [T, C], experts [T, C])."""
        return route(self.router(x_TD), ffn.top_k, ffn.renormalise, self.choice.bias[0] if ffn.biased else None)


class Decoder(nn.Module):
    """A language model or an encoder over one flat token axis.

    `max_len` is the context it is built for (the spec's by default); LongRoPE chooses its factors by it.
    On the meta device no memory is taken; `models.weights` fills it from a checkpoint.
    """

    def __init__(
        self,
        spec: ModelSpec,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        max_len: int | None = None,
    ) -> None:
        super().__init__()
        self.spec = spec
        self.max_len = max_len or spec.max_len
        with torch.device("meta"):
            self._build(spec)
        give_memory(self, device, dtype)
        self.stream: Stream | None = None  # where layers come from that are not in memory
        self.angles = {rope: Angles(rope, self.max_len) for rope in spec.ropes}

    def _build(self, spec: ModelSpec) -> None:
        embedding = spec.embedding
        if spec.joins:
            self.join = Weight(spec.hidden, 2 * spec.hidden)
            self.reading: Callable[[Decoder, Tensor, AttnContext], Tensor] | None = None
        else:
            self.embed = Weight(spec.vocab, spec.width)
        if embedding.positions:
            self.positions = Weight(embedding.positions.size + embedding.positions.offset, spec.hidden)
        if embedding.types:
            self.types = Weight(embedding.types, spec.hidden)
        if embedding.norm:
            self.embed_norm = Normalise(embedding.norm, spec.hidden)
        if embedding.project:
            self.embed_project = Weight(spec.hidden, spec.width)
            self.head_project = Weight(spec.width, spec.hidden)
        self.layers = nn.ModuleList(Layer(i, layer, spec.hidden, self.max_len) for i, layer in enumerate(spec.layers))
        if spec.norm:
            self.norm = Normalise(spec.norm, spec.hidden)
        if spec.head and not spec.head.tied:
            self.head = Weight(spec.vocab, spec.width, bias=spec.vocab if spec.head.bias else 0)
        if spec.score:
            reads, width = spec.score_input, spec.width
            self.score = Weight(spec.score, width, bias=spec.score if reads.bias else 0)
            if reads.dense:
                self.score_dense = Weight(width, width, bias=width if reads.dense_bias else 0)
            if reads.norm:
                self.score_norm = Normalise(reads.norm, width)

    @property
    def device(self) -> torch.device:
        return self._first.device

    @property
    def dtype(self) -> torch.dtype:
        return self._first.dtype

    @property
    def _first(self) -> Weight | QuantLinear:
        return self.join if self.spec.joins else self.embed

    @property
    def compute(self) -> torch.dtype:
        """What activations are kept in: fp32 on the CPU, where narrower weights are widened exactly."""
        return torch.float32 if self.device.type == "cpu" else self.dtype

    def forward(self, ids_T: Tensor, ctx: AttnContext, types_T: Tensor | None = None) -> Tensor:
        """Token ids [T] to the last layer's hidden states [T, D], final norm applied; types are 0 where not given."""
        if self.spec.joins:
            assert self.reading is not None, "a draft head learns beside a model (`draft_head.Reading`)"
            return self.reading(self, ids_T, ctx)
        return self.through(self.embedded(ids_T, ctx.positions_T, types_T), ctx)

    def through(self, x_TD: Tensor, ctx: AttnContext) -> Tensor:
        """The layers and the final norm: what enters the first layer [T, D] to hidden states [T, D]."""
        angles = {rope: make(ctx.positions_T) for rope, make in self.angles.items()}
        for layer in self.layers:
            x_TD = layer(x_TD, ctx, angles)
        return self.norm(x_TD) if self.spec.norm else x_TD

    def embedded(self, ids_T: Tensor, positions_T: Tensor, types_T: Tensor | None = None) -> Tensor:
        """What enters the first layer: token ids [T] at their positions to [T, D]."""
        embedding = self.spec.embedding
        x = self.embed.rows(ids_T).to(self.compute)
        if embedding.scale != 1.0:
            x = x * embedding.scale
        if embedding.project:
            x = self.embed_project(x)
        if embedding.positions:
            x = x + F.embedding(positions_T + embedding.positions.offset, self.positions.weight).to(self.compute)
        if embedding.types:
            x = x + (self.types.weight[:1] if types_T is None else self.types.rows(types_T)).to(self.compute)
        if embedding.norm:
            x = self.embed_norm(x)
        return x

    def logits(self, hidden_RD: Tensor) -> Tensor:
        """Scores over the vocabulary for the wanted rows: [R, D] to [R, V], fp32."""
        table, head = self._language_head()
        return scaled(table(self._projected(hidden_RD)).float(), head.multiplier, head.softcap)

    def logprobs(self, hidden_RD: Tensor, ids_R: Tensor, *, keep: bool = False, temperature: float = 1.0) -> Tensor:
        """log p [R] of one id for each row: the engine's bits, without the whole logits (see `kernels/loss.py`).

        With a `temperature` it is that of the distribution sampled from (the engine's "tempered" log-probabilities).
        """
        table, head = self._language_head()
        if isinstance(table, QuantLinear):
            return logprobs_of(tempered(self.logits(hidden_RD), temperature), ids_R)
        return table.logprobs(self._projected(hidden_RD), ids_R, head, keep, temperature)

    def entropy(self, hidden_RD: Tensor, *, temperature: float = 1.0) -> Tensor:
        """Entropy [R] in nats of what may come next at each row, without the whole logits (`kernels/entropy.py`)."""
        table, head = self._language_head()
        if isinstance(table, QuantLinear):
            return entropy_of(tempered(self.logits(hidden_RD), temperature))
        return table.entropy(self._projected(hidden_RD), head, temperature)

    def scores(self, hidden_RD: Tensor) -> Tensor:
        """What the score head says of each row: [R, D] to [R, labels], fp32."""
        if not self.spec.score:
            raise ConfigError("this model has no score head: give it one with models.scoring.as_reward or as_critic")
        x, reads = self._projected(hidden_RD), self.spec.score_input
        if reads.dense:
            x = self.score_dense(x)
            x = torch.tanh(x.contiguous()) if reads.act == "tanh" else activate(x, reads.act)
        scores: Tensor = self.score(self.score_norm(x) if reads.norm else x).float()
        return scores

    def _language_head(self) -> tuple[Weight | QuantLinear, Head]:
        head = self.spec.speaking()
        return self.embed if head.tied else self.head, head

    def _projected(self, hidden_RD: Tensor) -> Tensor:
        """As the heads read them, [R, E]."""
        return cast(Tensor, self.head_project(hidden_RD)) if self.spec.embedding.project else hidden_RD
