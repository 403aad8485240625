"""OPT: learned positions from the third row on; the 350m norms after each residual and projects its embeddings."""

from __future__ import annotations

from ..reader import Reader
from ..spec import Attention, Embedding, LayerSpec, Learned, ModelSpec, Names, Norm, Plain, PostResidual, Pre
from .llama import heads_of, layers_of, model
from .registry import family

D = "model.decoder."
LAYER = D + "layers.{i}."

NAMES = Names(
    table={
        "embed": D + "embed_tokens",
        "positions": D + "embed_positions",
        "embed_project": D + "project_in",
        "head_project": D + "project_out",
        "norm": D + "final_layer_norm",
        "head": "lm_head",
        "layers.{i}.q": LAYER + "self_attn.q_proj",
        "layers.{i}.k": LAYER + "self_attn.k_proj",
        "layers.{i}.v": LAYER + "self_attn.v_proj",
        "layers.{i}.out": LAYER + "self_attn.out_proj",
        "layers.{i}.up": LAYER + "fc1",
        "layers.{i}.down": LAYER + "fc2",
        "layers.{i}.norm1": LAYER + "self_attn_layer_norm",
        "layers.{i}.norm2": LAYER + "final_layer_norm",
    },
    prefix="model.",
)

OFFSET = 2


@family("OPTForCausalLM")
def opt(hf: Reader) -> ModelSpec:
    """OPT 125m to 175B."""
    heads, kv_heads, head_dim = heads_of(hf)
    hidden = hf.size("hidden_size")
    bias = hf.get(bool, "enable_bias", default=True)
    affine = hf.get(bool, "layer_norm_elementwise_affine", default=True)
    norm = Norm(kind="layer", eps=1e-5, weight=affine, bias=affine)
    before = hf.get(bool, "do_layer_norm_before", default=True)
    mixer = Attention(heads=heads, kv_heads=kv_heads, head_dim=head_dim, qkv_bias=bias, out_bias=bias)
    ffn = Plain(width=hf.size("ffn_dim"), act=hf.act("activation_function", default="relu"), bias=bias)
    layer = LayerSpec(mixer=mixer, ffn=ffn, norms=Pre(norm=norm) if before else PostResidual(norm=norm))
    removed = hf.get(bool, "_remove_final_layer_norm", default=False)
    positions = hf.size("max_position_embeddings", default=2048)
    width = hf.get(int, "word_embed_proj_dim", default=None) or hidden
    return model(
        hf,
        "OPTForCausalLM",
        layers_of(hf, lambda i: layer),
        norm=norm if before and not removed else None,
        names=NAMES,
        max_len=positions,
        tied=True,
        embedding=Embedding(
            positions=Learned(size=positions, offset=OFFSET), project=None if width == hidden else width
        ),
    )
