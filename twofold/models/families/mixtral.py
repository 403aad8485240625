"""Mixtral: Mistral with a mixture of experts in each layer."""

from __future__ import annotations

from ...core.errors import CheckpointError
from ..reader import Reader
from ..spec import Attention, LayerSpec, Mixture, ModelSpec, Names, Pre
from .llama import LAYER, context_of, heads_of, layers_of, model, names, rms, window_of
from .registry import family
from .rope import rope_from

MOE = LAYER + "block_sparse_moe."
FUSED = LAYER + "mlp."


def _names() -> Names:
    base = names()
    experts = {
        "layers.{i}.router": MOE + "gate",
        "layers.{i}.experts.{e}.gate": MOE + "experts.{e}.w1",
        "layers.{i}.experts.{e}.up": MOE + "experts.{e}.w3",
        "layers.{i}.experts.{e}.down": MOE + "experts.{e}.w2",
    }
    also = {
        "layers.{i}.router": FUSED + "gate",
        "layers.{i}.experts.gate_up.weight": FUSED + "experts.gate_up_proj",
        "layers.{i}.experts.down.weight": FUSED + "experts.down_proj",
    }
    return Names(table=base.table | experts, also=also, prefix=base.prefix, ignore=base.ignore)


def mixture(
    hf: Reader, *, experts: int, top_k: int, width: int, renormalise: bool, shared: int | None = None
) -> Mixture:
    """Experts of `width`; `experts` and `top_k` are the family's defaults for absent keys.

    Raises:
        CheckpointError: more experts asked for than there are.
    """
    count = hf.size("num_local_experts", "num_experts", default=experts)
    chosen = hf.size("num_experts_per_tok", default=top_k)
    if chosen > count:
        raise CheckpointError(f"config.json: num_experts_per_tok is {chosen} of {count} experts")
    act = hf.act("hidden_act", default="silu")
    return Mixture(experts=count, top_k=chosen, width=width, act=act, renormalise=renormalise, shared_width=shared)


@family("MixtralForCausalLM")
def mixtral(hf: Reader) -> ModelSpec:
    """Mixtral 8x7B and 8x22B: softmax over the experts, the best k renormalised."""
    heads, kv_heads, head_dim = heads_of(hf, kv_heads=8)
    rope = rope_from(hf, head_dim, theta=1e6)
    mixer = Attention(
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        position=rope,
        window=window_of(hf),
    )
    ffn = mixture(hf, experts=8, top_k=2, width=hf.size("intermediate_size"), renormalise=True)
    layer = LayerSpec(mixer=mixer, ffn=ffn, norms=Pre(norm=rms(hf, 1e-5)))
    return model(
        hf,
        "MixtralForCausalLM",
        layers_of(hf, lambda i: layer),
        norm=rms(hf, 1e-5),
        names=_names(),
        max_len=context_of(hf, rope, 131_072),
    )
