"""Writer: turns a Decoder's layers into the stages of a Program; reads like `Decoder.forward`, and must.

Shapes: T tokens, R wanted rows, D hidden size, E embedding size, V vocabulary, F feed-forward width.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from ..kernels import stages
from ..kernels.attention import Attend
from ..kernels.grouped import Matrices
from ..kernels.linear import stage_of as linear_stage
from ..kernels.moe import gate_stage, route_stage
from ..kernels.norm import stage_of as norm_stage
from ..kernels.panels import Rounding, embed_stage, wide_gate
from ..kernels.panels import stages_for as panel_stages
from ..quant.linear import QuantLinear
from . import adapters
from .beside import Beside
from .decoder import Decoder, Layer
from .lora import Lora
from .spec import Gated, Mixture, Parallel, PostOutput, PostResidual, Pre, PreFfn, Rope, Sandwich
from .tensors import Normalise, Weight, each_expert
from .working import Working

Stages = list[ctypes.Structure]


class Writer(Working):
    """The memory that a program's stages work in, and the stages in their order.

    x is the residual stream, h a part's input, y and z parts' outputs; a part's output is added to x by the next norm.
    """

    def __init__(
        self, decoder: Decoder, caches: Sequence[stages.Cache], step: stages.Step, tokens: int, rows: int
    ) -> None:
        super().__init__(tokens, decoder.spec.hidden)
        self.decoder, self.caches, self.step = decoder, caches, step
        self.tokens, self.wanted = self._address("tokens"), self._address("wanted")
        spec = decoder.spec
        mixers = [layer.mixer for layer in spec.layers]
        self.x_TD, self.h_TD, self.y_TD, self.z_TD = (torch.empty(tokens, spec.hidden) for _ in range(4))
        self.qkv_T = torch.empty(tokens, max((m.q_width + 2 * m.kv_width for m in mixers), default=1))
        self.mixed_T = torch.empty(tokens, max((m.q_width for m in mixers), default=1))
        self.inner_TF = torch.empty(tokens, max((_width(layer.ffn) for layer in spec.layers), default=1))
        self.hidden_TD = torch.empty(tokens, spec.hidden) if spec.norm else self.x_TD
        self.finite_T = torch.empty(tokens, dtype=torch.uint8)
        self.picked_RD = torch.empty(rows, spec.hidden)
        self.logits_RV = torch.empty(rows if spec.head else 0, spec.vocab)
        self.rounding = Rounding(max(tokens, rows))
        self.beside = Beside(decoder, tokens)
        self._turns: dict[Rope, tuple[Tensor, Tensor]] = {}
        self._written: Stages = []
        self.cuts: list[int] = []  # where each layer begins among the body's stages, and where the last one ends
        self._seated = False

    def body(self, seated: bool = False) -> Stages:
        """From token ids to the last hidden states; `seated`: with what stands in the slots of a served model."""
        self._seated = seated
        self._written = self.beside.deal(self.tokens) if seated or not self.beside.slots else []
        self._embed()
        self.cuts = []
        pending: tuple[Tensor, float] | None = None
        for layer, cache in zip(self.decoder.layers, self.caches, strict=True):
            assert isinstance(layer, Layer)
            self.cuts.append(len(self._written))
            pending = self._layer(layer, cache, pending)
        self.cuts.append(len(self._written))
        if self.decoder.spec.norm:
            self._norm(self.decoder.norm, self.x_TD, self.hidden_TD, pending)
        elif pending:
            self._add(*pending)
        self._stage(
            stages.Finite(
                rows=self.tokens,
                width=self.hidden_TD.shape[1],
                x=self.hidden_TD.data_ptr(),
                x_stride=self.hidden_TD.stride(0),
                out=self.finite_T.data_ptr(),
            )
        )
        return self._written

    def head(self) -> Stages:
        """From the wanted rows' hidden states to logits; nothing where there is no language head."""
        self._written, self._seated, decoder = [], False, self.decoder
        if (head := decoder.spec.head) is None:
            return self._written
        self._stage(
            stages.Gather(
                rows=self.wanted,
                index=self._address("rows"),
                width=decoder.spec.hidden,
                source=self.hidden_TD.data_ptr(),
                source_stride=self.hidden_TD.stride(0),
                out=self.picked_RD.data_ptr(),
                out_stride=self.picked_RD.stride(0),
            )
        )
        source = self.picked_RD
        if decoder.spec.embedding.project:
            source = self._kept_tensor(len(self.picked_RD), decoder.spec.embedding.project)
            self._linear(decoder.head_project, self.picked_RD, source, rows=self.wanted)
        self._linear(decoder.embed if head.tied else decoder.head, source, self.logits_RV, rows=self.wanted)
        if head.multiplier != 1.0 or head.softcap is not None:
            multiplier = head.multiplier if head.multiplier != 1.0 else 0.0
            self._pointwise(
                self.logits_RV, self.logits_RV, rows=self.wanted, multiplier=multiplier, softcap=head.softcap or 0.0
            )
        return self._written

    # ------------------------------------------------------------------------------------------------- layers
    def _embed(self) -> None:
        embedding, decoder = self.decoder.spec.embedding, self.decoder
        width = embedding.project or decoder.spec.hidden
        out = self._kept_tensor(len(self.x_TD), width) if embedding.project else self.x_TD
        places = embedding.positions
        vectors, offset = (decoder.positions.weight, places.offset) if places else (None, 0)
        if isinstance(decoder.embed, QuantLinear):
            scale, table = embedding.scale, decoder.embed.packed
            self._stage(embed_stage(self.step, table, out, scale=scale, places=vectors, offset=offset))
        else:
            self._stage(
                stages.Embed(
                    step=ctypes.pointer(self.step),
                    table=stages.numbers(decoder.embed.weight),
                    places=stages.numbers(vectors),
                    kinds=stages.numbers(decoder.types.weight if embedding.types else None),
                    width=width,
                    offset=offset,
                    scale=embedding.scale,
                    out=out.data_ptr(),
                    out_stride=out.stride(0),
                )
            )
        if embedding.project:
            self._linear(decoder.embed_project, out, self.x_TD)
        if embedding.norm:
            self._norm(decoder.embed_norm, self.x_TD, self.x_TD)

    def _layer(
        self, layer: Layer, cache: stages.Cache, pending: tuple[Tensor, float] | None
    ) -> tuple[Tensor, float] | None:
        x, h, y, z, m = self.x_TD, self.h_TD, self.y_TD, self.z_TD, layer.spec.residual
        match layer.spec.norms:
            case Pre():
                self._norm(layer.norm1, x, h, pending)
                self._attention(layer, cache, h, y)
                self._norm(layer.norm2, x, h, (y, m))
                self._ffn(layer, h, y)
                return y, m
            case PreFfn():
                if pending:
                    self._add(*pending)
                self._attention(layer, cache, x, y)
                self._norm(layer.norm2, x, h, (y, m))
                self._ffn(layer, h, y)
                return y, m
            case Parallel(shared=shared):
                self._norm(layer.norm1, x, h, pending)
                self._attention(layer, cache, h, y)
                if not shared:
                    self._norm(layer.norm2, x, h)
                self._ffn(layer, h, z)
                self._add(y, m, z)
                return None
            case PostOutput():
                self._attention(layer, cache, x, y)
                self._norm(layer.norm1, y, z)
                self._add(z, m)
                self._ffn(layer, x, y)
                self._norm(layer.norm2, y, z)
                self._add(z, m)
                return None
            case Sandwich():
                self._norm(layer.norm1, x, h, pending)
                self._attention(layer, cache, h, y)
                self._norm(layer.norm2, y, z)
                self._norm(layer.norm3, x, h, (z, m))
                self._ffn(layer, h, y)
                self._norm(layer.norm4, y, z)
                return z, m
            case PostResidual():
                self._attention(layer, cache, x, y)
                self._norm(layer.norm1, x, x, (y, m))
                self._ffn(layer, x, y)
                self._norm(layer.norm2, x, x, (y, m))
                return None

    def _attention(self, layer: Layer, cache: stages.Cache, source: Tensor, out: Tensor) -> None:
        mixer, how = layer.spec.mixer, layer.attend
        qkv, clip = self.qkv_T, mixer.clip_qkv or 0.0
        self._linear(layer.qkv, source, qkv)
        if mixer.qk_norm == "full":
            if clip:
                self._pointwise(qkv, qkv, width=mixer.q_width + 2 * mixer.kv_width, clip=clip)
                clip = 0.0
            for norm, at in ((layer.q_norm, 0), (layer.k_norm, mixer.q_width)):
                self._norm(norm, qkv[:, at:], qkv[:, at:])
        self._stage(self._heads(layer, cache, clip))
        self._stage(
            stages.Attention(
                step=ctypes.pointer(self.step),
                cache=cache,
                q=qkv.data_ptr(),
                q_stride=qkv.stride(0),
                out=self.mixed_T.data_ptr(),
                out_stride=self.mixed_T.stride(0),
                heads=mixer.heads,
                window=how.window or 0,
                scale=how.scale,
                softcap=how.softcap or 0.0,
                slopes=self._keep(torch.tensor(how.slopes)).data_ptr() if how.slopes else None,
                sparse=self._sparse(how),
                ahead=not how.causal,
            )
        )
        self._linear(layer.out, self.mixed_T, out)

    def _heads(self, layer: Layer, cache: stages.Cache, clip: float) -> stages.Heads:
        mixer = layer.spec.mixer
        made = stages.Heads(
            step=ctypes.pointer(self.step),
            cache=cache,
            qkv=self.qkv_T.data_ptr(),
            qkv_stride=self.qkv_T.stride(0),
            heads=mixer.heads,
            clip=clip,
        )
        if mixer.qk_norm in ("head", "per_head"):
            norm = layer.q_norm.spec
            made.norm, made.eps, made.offset = ("rms", "layer").index(norm.kind) + 1, norm.eps, norm.offset
            made.per_head = mixer.qk_norm == "per_head"
            made.q_weight, made.k_weight = stages.numbers(layer.q_norm.weight), stages.numbers(layer.k_norm.weight)
            made.q_bias, made.k_bias = stages.numbers(layer.q_norm.bias), stages.numbers(layer.k_norm.bias)
        if isinstance(mixer.position, Rope):
            cos, sin = self._turn(mixer.position)
            made.pairs, made.interleaved = cos.shape[1], mixer.position.interleaved
            made.cos, made.sin = cos.data_ptr(), sin.data_ptr()
        return made

    def _ffn(self, layer: Layer, source: Tensor, out: Tensor) -> None:
        ffn = layer.spec.ffn
        if isinstance(ffn, Mixture):
            self._mixture(layer, ffn, source, out)
            return
        gated = isinstance(ffn, Gated)
        self._linear(layer.gate_up if gated else layer.up, source, self.inner_TF, act=ffn.act, gated=gated)
        self._linear(layer.down, self.inner_TF, out)

    def _mixture(self, layer: Layer, ffn: Mixture, source: Tensor, out: Tensor) -> None:
        assert layer.experts.exchange is None, "experts that live in several processes are served when joined"
        mixing = self._mixing(ffn)
        logits_TE = self._shared("router", ffn.experts)
        self._linear(layer.router, source, logits_TE)
        how = mixing.weights_TC, mixing.chosen_TC, self.tokens, layer.choice.bias[0] if ffn.biased else None
        self._stage(route_stage(logits_TE, ffn.renormalise, *how))
        gate_up, down = (
            Matrices(each_expert(module), gated=gated)
            for module, gated in ((layer.experts.gate_up, True), (layer.experts.down, False))
        )
        self._kept += [gate_up, down]
        self._written += mixing.stages_of(source, gate_up, down, out, ffn.act, self.tokens)
        if ffn.shared_width:
            inner, y = self._shared("wide", ffn.shared_width), self._shared("y", out.shape[1])
            self._linear(layer.shared.gate_up, source, inner, act=ffn.act, gated=True)
            self._linear(layer.shared.down, inner, y)
            if ffn.shared_gate:
                self._linear(layer.shared_gate, source, gate := self._shared("gate", 1))
                self._stage(gate_stage(out, y, gate, out, self.tokens))
            else:
                self._add(y, 1.0, onto=out)

    # ------------------------------------------------------------------------------------------------- stages
    def _linear(
        self,
        module: Weight | QuantLinear,
        source: Tensor,
        out: Tensor,
        *,
        rows: int | None = None,
        act: str = "none",
        gated: bool = False,
    ) -> None:
        rows = self.tokens if rows is None else rows
        lora = module.lora
        if isinstance(lora, Lora) or (self._seated and isinstance(lora, adapters.Beside)):
            wide = self._shared("opened later", lora.outputs) if gated else out
            self._product(module, source, wide, rows)
            self._written += self.beside.stages_of(lora, source, wide, rows, self.rounding)
            if gated:
                self._stage(wide_gate(wide, out, rows, act))
            elif act != "none":
                self._pointwise(out, out, rows=rows, width=lora.outputs, act=stages.ACTS[act])
        else:
            self._product(module, source, out, rows, act, gated)

    def _product(
        self,
        module: Weight | QuantLinear,
        source: Tensor,
        out: Tensor,
        rows: int,
        act: str = "none",
        gated: bool = False,
    ) -> None:
        if isinstance(module, QuantLinear):
            w, rounding = module.packed, self.rounding
            b, order = module.bias, module.order
            self._written += panel_stages(source, w, b, out, rows, rounding, act=act, gated=gated, order_K=order)
        else:
            self._stage(linear_stage(source, module.weight, module.bias, out, rows, act=act, gated=gated))

    def _norm(self, module: Normalise, x: Tensor, out: Tensor, add: tuple[Tensor, float] | None = None) -> None:
        y, scale = add or (None, 1.0)
        spec, shape = module.spec, module.shape
        self._stage(
            norm_stage(
                module.weight,
                module.bias,
                spec.eps,
                self.tokens,
                kind=spec.kind,
                groups=shape[0] if len(shape) == 2 else 1,
                width=shape[-1],
                offset=spec.offset,
                x=x,
                out=out,
                y=y,
                scale=scale,
            )
        )

    def _add(self, y: Tensor, scale: float, z: Tensor | None = None, onto: Tensor | None = None) -> None:
        self._stage(
            stages.Add(
                rows=self.tokens,
                width=(x := self.x_TD if onto is None else onto).shape[1],
                scale=scale,
                x=x.data_ptr(),
                x_stride=x.stride(0),
                y=y.data_ptr(),
                y_stride=y.stride(0),
                z=None if z is None else z.data_ptr(),
                z_stride=0 if z is None else z.stride(0),
            )
        )

    def _pointwise(
        self, x: Tensor, out: Tensor, *, rows: int | None = None, width: int | None = None, **what: float
    ) -> None:
        self._stage(
            stages.Pointwise(
                rows=self.tokens if rows is None else rows,
                width=x.shape[1] if width is None else width,
                x=x.data_ptr(),
                x_stride=x.stride(0),
                out=out.data_ptr(),
                out_stride=out.stride(0),
                **what,
            )
        )

    def _stage(self, stage: ctypes.Structure) -> None:
        self._written.append(stage)

    # ------------------------------------------------------------------------------------------------- memory
    def _address(self, field: str) -> int:
        return ctypes.addressof(self.step) + int(getattr(stages.Step, field).offset)

    def _sparse(self, how: Attend) -> stages.Sparse:
        if how.sparse is None:
            return stages.Sparse()
        table = how.sparse.table()
        self._kept += [table.bits_PIB, table.pattern_H]
        return table.struct()

    def _turn(self, rope: Rope) -> tuple[Tensor, Tensor]:
        """cos and sin of every position that the decoder is built for; their room alone where bytes are counted."""
        if rope not in self._turns:
            angles, length = self.decoder.angles[rope], self.decoder.max_len
            cos, sin = angles.room(length) if self.x_TD.is_meta else angles(torch.arange(length))
            self._turns[rope] = (cos.contiguous(), sin.contiguous())
        return self._turns[rope]


def _width(ffn: object) -> int:
    return int(getattr(ffn, "width", 1))
