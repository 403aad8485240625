"""Draft heads after EAGLE: a layer of Llama without a norm before attention; no embedding, no language head."""

from __future__ import annotations

from ..reader import Reader
from ..spec import Attention, Gated, LayerSpec, ModelSpec, Names, PreFfn
from .llama import LAYER, NAMES, context_of, heads_of, hidden_of, layers_of, rms
from .registry import headless
from .rope import rope_from

ARCHITECTURE = "EagleDraftHead"
TARGET = "target"
"""The table of config.json that says whom the head guesses for."""


@headless(ARCHITECTURE)
def eagle(hf: Reader) -> ModelSpec:
    """EAGLE's names: `fc` joins hidden states with embeddings, and layers begin at the top."""
    heads, kv_heads, head_dim = heads_of(hf)
    rope = rope_from(hf, head_dim)
    mixer = Attention(heads=heads, kv_heads=kv_heads, head_dim=head_dim, position=rope)
    ffn = Gated(width=hf.size("intermediate_size"), act=hf.act("hidden_act", default="silu"))
    layer = LayerSpec(mixer=mixer, ffn=ffn, norms=PreFfn(norm=rms(hf)))
    ours = ("q", "k", "v", "out", "gate", "up", "down", "norm2")
    own = LAYER.removeprefix("model.")
    table = {f"layers.{{i}}.{part}": own + NAMES[f"layers.{{i}}.{part}"].removeprefix(LAYER) for part in ours}
    hf.get(dict, TARGET, default=None)
    return ModelSpec(
        architecture=ARCHITECTURE,
        hidden=hidden_of(hf),
        vocab=hf.size("vocab_size"),
        layers=layers_of(hf, lambda i: layer),
        norm=None,
        head=None,
        names=Names(table={"join": "fc", **table}),
        max_len=context_of(hf, rope),
        joins=True,
    )
