"""StarCoder 2: layer norms and biases everywhere, a plain feed-forward, one window for all layers."""

from __future__ import annotations

from ..reader import Reader
from ..spec import Attention, LayerSpec, ModelSpec, Norm, Plain, Pre
from .llama import context_of, heads_of, layers_of, model, names, window_of
from .registry import family
from .rope import rope_from


@family("Starcoder2ForCausalLM")
def starcoder2(hf: Reader) -> ModelSpec:
    """StarCoder 2 3B, 7B and 15B."""
    heads, kv_heads, head_dim = heads_of(hf, kv_heads=2)
    hf.expect("mlp_type", "default")
    hf.expect("norm_type", "layer_norm")
    hf.expect("scale_attn_weights", True)
    hf.ignore("activation_function")
    bias = hf.get(bool, "use_bias", default=True)
    norm = Norm(kind="layer", eps=hf.get(float, "norm_epsilon", "layer_norm_epsilon", default=1e-5), bias=True)
    rope = rope_from(hf, head_dim)
    mixer = Attention(
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        qkv_bias=bias,
        out_bias=bias,
        position=rope,
        window=window_of(hf),
    )
    ffn = Plain(width=hf.size("intermediate_size"), act=hf.act("hidden_act", default="gelu_pytorch_tanh"), bias=bias)
    layer = LayerSpec(mixer=mixer, ffn=ffn, norms=Pre(norm=norm))
    return model(
        hf,
        "Starcoder2ForCausalLM",
        layers_of(hf, lambda i: layer),
        norm=norm,
        names=names(up="mlp.c_fc", down="mlp.c_proj"),
        max_len=context_of(hf, rope, 4096),
        tied=True,
    )
