"""ERNIE 4.5 MoE: Llama's attention turned pairwise, and experts chosen with a bias that its makers balanced them by."""

from __future__ import annotations

from ...core.errors import CheckpointError
from ..reader import Reader
from ..spec import Attention, Ffn, Gated, LayerSpec, Mixture, ModelSpec, Names, Pre
from .llama import LAYER, context_of, heads_of, layers_of, model, names, rms
from .registry import family
from .rope import rope_from

MLP = LAYER + "mlp."
BIAS = "moe_statics.e_score_correction_bias"


def _names() -> Names:
    base = names()
    experts = {
        "layers.{i}.router": MLP + "gate",
        "layers.{i}.choice.bias": MLP + BIAS,
        "layers.{i}.experts.{e}.gate": MLP + "experts.{e}.gate_proj",
        "layers.{i}.experts.{e}.up": MLP + "experts.{e}.up_proj",
        "layers.{i}.experts.{e}.down": MLP + "experts.{e}.down_proj",
        "layers.{i}.shared.gate": MLP + "shared_experts.gate_proj",
        "layers.{i}.shared.up": MLP + "shared_experts.up_proj",
        "layers.{i}.shared.down": MLP + "shared_experts.down_proj",
    }
    also = {
        "layers.{i}.choice.bias": MLP + "gate." + BIAS,
        "layers.{i}.experts.gate_up.weight": MLP + "experts.gate_up_proj",
        "layers.{i}.experts.down.weight": MLP + "experts.down_proj",
    }
    return Names(table=base.table | experts, also=also, prefix=base.prefix, ignore=base.ignore)


def _mixture(hf: Reader) -> Mixture:
    count = hf.size("moe_num_experts", "num_experts", default=64)
    top_k = hf.size("moe_k", "num_experts_per_tok", default=6)
    if top_k > count:
        raise CheckpointError(f"config.json: moe_k is {top_k} of {count} experts")
    width = hf.size("moe_intermediate_size", default=1536)
    return Mixture(
        experts=count,
        top_k=top_k,
        width=width,
        act=hf.act("hidden_act", default="silu"),
        biased=True,
        shared_width=width * hf.get(int, "moe_num_shared_experts", default=2) or None,
        shared_gate=False,
    )


@family("Ernie4_5_MoeForCausalLM")
def ernie_moe(hf: Reader) -> ModelSpec:
    """ERNIE 4.5 21B-A3B and 300B-A47B; also the family to train in when experts are balanced by a bias."""
    hf.expect("use_bias", False, None)
    hf.ignore("moe_norm_min", "moe_capacity", "moe_aux_loss_lambda")
    hf.expect("moe_gate", "topk")
    hf.expect("moe_use_aux_free", True)
    heads, kv_heads, head_dim = heads_of(hf, kv_heads=4)
    rope = rope_from(hf, head_dim, theta=500_000.0, interleaved=True)
    mixer = Attention(heads=heads, kv_heads=kv_heads, head_dim=head_dim, position=rope)
    experts, dense = _mixture(hf), Gated(width=hf.size("intermediate_size"), act=hf.act("hidden_act", default="silu"))
    first = hf.get(int, "moe_layer_start_index", default=1)
    last = hf.get(int, "moe_layer_end_index", default=-1)
    every = hf.size("moe_layer_interval", default=1)

    def layer(i: int) -> LayerSpec:
        mixed = (i + 1) % every == 0 and i >= first and (i <= last or last == -1)
        ffn: Ffn = experts if mixed else dense
        return LayerSpec(mixer=mixer, ffn=ffn, norms=Pre(norm=rms(hf, 1e-5)))

    return model(
        hf,
        "Ernie4_5_MoeForCausalLM",
        layers_of(hf, layer),
        norm=rms(hf, 1e-5),
        names=_names(),
        max_len=context_of(hf, rope, 131_072),
        tied=True,
    )
