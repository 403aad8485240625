"""Draft heads: one layer that goes on with another model's hidden states, so that its next tokens can be guessed.

    place       0     1     2     3     4 (guess)
    model       h0    h1    h2                         hidden states, final norm applied
    head reads  0 t0  h0 t1 h1 t2 h2 t3 f3 t4          join([hidden state before, embedding]), [2D] to [D]
    head says   f0    f1    f2    f3    f4             f is to be h; its token is what the model's head says

After EAGLE (Li et al. 2024): the model's embedding and language head are the model's own, frozen, and the head has the
join and its layers. What stands before a text's first token, or before the first whose hidden state is known, is zeros.

Shapes: T tokens, K depths, D hidden size.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core.errors import ConfigError
from .context import AttnContext
from .decoder import Decoder
from .families.eagle import ARCHITECTURE, TARGET
from .spec import Gated, ModelSpec, Plain, Rope

PROBES, PROBE = 64, 4096
"""Places of a file that a digest reads, and bytes of each."""


def digest(folder: Path) -> str:
    """What tells a checkpoint from another: its settings, the sizes of its files, and numbers from all over them."""
    found = hashlib.sha256()
    for path in sorted((folder / "config.json", *folder.glob("model*.safetensors"))):
        size = path.stat().st_size
        found.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            for number in range(PROBES):
                file.seek(size * number // PROBES)
                found.update(file.read(PROBE))
    return found.hexdigest()


def config_for(target: ModelSpec, name: str, width: int | None = None) -> dict[str, Any]:
    """The config.json of a head for `target`, whose digest is `name`; its feed-forward is `width` wide.

    Attention is as in the model's last layer, with rotary positions, which the model need not have.

    Raises:
        ConfigError: a model that makes no text.
    """
    target.speaking()
    mixer, ffn = target.layers[-1].mixer, target.layers[-1].ffn
    usual = ffn.width if isinstance(ffn, Gated | Plain) else ffn.shared_width or ffn.top_k * ffn.width
    return {
        "architectures": [ARCHITECTURE],
        "model_type": "eagle",
        "hidden_size": target.hidden,
        "vocab_size": target.vocab,
        "num_hidden_layers": 1,
        "num_attention_heads": mixer.heads,
        "num_key_value_heads": mixer.kv_heads,
        "head_dim": mixer.head_dim,
        "intermediate_size": width or usual,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": mixer.position.theta if isinstance(mixer.position, Rope) else 10_000.0,
        "max_position_embeddings": target.max_len,
        TARGET: {"architecture": target.architecture, "digest": name},
    }


def check(head: ModelSpec, target: ModelSpec) -> None:
    """Raises ConfigError when a checkpoint is no draft head, or one for models of another shape."""
    if not head.joins:
        raise ConfigError(
            f"{head.architecture} is a model, not a draft head: train one with [draft_head], or set speculative.method "
            "to draft_model"
        )
    ours, theirs = (head.hidden, head.vocab), (target.hidden, target.vocab)
    if ours != theirs:
        raise ConfigError(
            f"the draft head is for models {ours[0]} wide with {ours[1]} tokens, and this one is {theirs[0]} wide with "
            f"{theirs[1]}: give the head that was trained beside this model"
        )


def made_for(config: Mapping[str, Any]) -> str:
    """The digest of the model that a head was trained beside, "" where its config.json does not say."""
    target = config.get(TARGET)
    found = target.get("digest") if isinstance(target, dict) else None
    return found if isinstance(found, str) else ""


class Reading:
    """What a head reads while it learns, and how: `target` makes the hidden states on the fly, without gradients.

    The head then says f at `depth` depths: at the first it reads the model's hidden states, at each further one what it
    said itself one depth before, as when it guesses. `seen_TD` is what it should have said.
    """

    def __init__(self, target: Decoder, depth: int) -> None:
        self.target, self.depth = target.requires_grad_(False), depth
        self.seen_TD = torch.empty(0)

    def __call__(self, head: Decoder, ids_T: Tensor, ctx: AttnContext) -> Tensor:
        """What the head says at all depths, one after another: [K·T, D]."""
        with torch.no_grad():
            self.seen_TD = self.target(ids_T, ctx)
            tokens_TD = self.target.embedded(ids_T, ctx.positions_T)
        begins_T1 = (ctx.positions_T == 0)[:, None]
        before_TD, said = self.seen_TD, list[Tensor]()
        for _ in range(self.depth):
            shifted_TD = before_TD.roll(1, 0).masked_fill(begins_T1, 0.0)
            before_TD = head.through(head.join(torch.cat((shifted_TD, tokens_TD), -1)), ctx)
            said.append(before_TD)
        return torch.cat(said)
