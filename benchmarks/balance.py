"""How evenly are a mixture's experts used on a skewed corpus, with each way to balance them, against none?

    twofold bench balance [--quick] [--json FILE]

The same tiny ERNIE 4.5 MoE from the same weights learns the same invented corpus: a chain of words whose frequencies
fall as 1/rank, so that a few words, and so a few experts, have most of the work. What is held out is then dealt as it
would be served, without noise: the busiest expert's share of the worst layer, and the share of all choices that a
capacity of 1.25 would drop. Everything is a function of the seed; nothing is timed.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from twofold.models import PackedContext, spec_from
from twofold.models.decoder import Decoder
from twofold.train import loss as losses
from twofold.train.config import OptimizerConfig
from twofold.train.init import init_weights
from twofold.train.moe import Routers
from twofold.train.moe_config import MoeConfig
from twofold.train.optimizer import Optimizer

CAPACITY = 1.25
METHODS = {
    "none": MoeConfig(),
    "loss": MoeConfig(balance_loss=0.02),
    "loss and z-loss": MoeConfig(balance_loss=0.02, z_loss=1e-3),
    "bias": MoeConfig(bias_rate=5e-3),
    "gumbel": MoeConfig(noise="gumbel"),
    "jitter and loss": MoeConfig(balance_loss=0.02, noise="jitter"),
}


@dataclass(frozen=True, kw_only=True)
class Size:
    """How long each method trains, and on what."""

    steps: int
    sequences: int = 16
    length: int = 64
    experts: int = 8
    vocab: int = 256

    @property
    def tokens(self) -> int:
        return self.sequences * self.length


QUICK, FULL = Size(steps=60), Size(steps=400)


class Corpus:
    """Sequences of a chain: half of the words are drawn by frequency, half follow from the word before."""

    def __init__(self, size: Size) -> None:
        self.size = size
        self.frequency_V = 1.0 / torch.arange(1, size.vocab + 1)
        self.next_V = torch.multinomial(
            self.frequency_V, size.vocab, replacement=True, generator=torch.Generator().manual_seed(1)
        )

    def batch(self, number: int) -> tuple[Tensor, Tensor]:
        """Ids and targets [T] of batch `number`; -1 is the held-out one."""
        size, generator = self.size, torch.Generator().manual_seed(1000 + number)
        shape = (size.sequences, size.length + 1)
        drawn = torch.multinomial(self.frequency_V, shape[0] * shape[1], replacement=True, generator=generator)
        ids, follows = drawn.view(shape), torch.rand(shape, generator=generator) < 0.5
        for place in range(1, shape[1]):
            ids[:, place] = torch.where(follows[:, place], self.next_V[ids[:, place - 1]], ids[:, place])
        return ids[:, :-1].reshape(-1), ids[:, 1:].reshape(-1)


def model(size: Size) -> Decoder:
    """Two layers of experts, the same weights at each call."""
    config = {
        "architectures": ["Ernie4_5_MoeForCausalLM"],
        "vocab_size": size.vocab,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "moe_num_experts": size.experts,
        "moe_k": 2,
        "moe_intermediate_size": 32,
        "moe_num_shared_experts": 0,
        "moe_layer_start_index": 0,
        "max_position_embeddings": size.length,
    }
    decoder = Decoder(spec_from(config))
    init_weights(decoder, seed=0)
    return decoder


def pass_over(decoder: Decoder, routers: Routers, batch: tuple[Tensor, Tensor], size: Size, number: int) -> float:
    """Forward, and backward where gradients are on, of one batch under the rules: its mean loss."""
    ids, targets = batch
    routers.begin(number, size.tokens)
    hidden_TD = decoder(ids, PackedContext((size.length,) * size.sequences))
    if torch.is_grad_enabled():
        return losses.backward(decoder, hidden_TD, targets, size.tokens, size.vocab) / size.tokens
    return losses.evaluate(decoder, hidden_TD, targets, size.vocab)[0] / size.tokens


def train(config: MoeConfig, size: Size) -> dict[str, float]:
    """One method, from the first weights to the figures of what was held out."""
    decoder, corpus = model(size), Corpus(size)
    optimizer = Optimizer(decoder.named_parameters(), OptimizerConfig(lr=1e-2))
    routers, busiest = Routers(decoder, config, seed=0), 0.0
    for number in range(size.steps):
        pass_over(decoder, routers, corpus.batch(number), size, number)
        optimizer.clip()
        optimizer.step(1e-2)
        optimizer.zero()
        share = routers.end()["moe_busiest"]
        busiest += share / (size.steps // 4) if number >= size.steps - size.steps // 4 else 0.0
    judge = Routers(decoder, MoeConfig(), seed=0)
    with torch.no_grad():
        loss = pass_over(decoder, judge, corpus.batch(-1), size, 0)
        held_out = judge.end()
        tight = Routers(decoder, replace(MoeConfig(), capacity=CAPACITY), seed=0)
        pass_over(decoder, tight, corpus.batch(-1), size, 0)
    return {
        "busiest_in_training": busiest,
        "busiest": held_out["moe_busiest"],
        "dropped": tight.end()["moe_dropped"],
        "loss": loss,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help=f"{QUICK.steps} steps for each, not {FULL.steps}")
    parser.add_argument("--json", type=Path, help="write the figures there")
    args = parser.parse_args()
    size = QUICK if args.quick else FULL
    torch.set_num_threads(1)
    print(f"{size.experts} experts, 2 of them for a token: an even share is {1 / size.experts:.1%}; {size.steps} steps")
    print(f"{'method':<18}{'busiest, training':>19}{'busiest, held out':>19}{'dropped at 1.25':>17}{'loss':>8}")
    record: dict[str, Any] = {}
    for name, config in METHODS.items():
        found = record[name] = train(config, size)
        shares = f"{found['busiest_in_training']:>19.1%}{found['busiest']:>19.1%}{found['dropped']:>17.1%}"
        print(f"{name:<18}{shares}{found['loss']:>8.3f}", flush=True)
    if args.json:
        args.json.write_text(
            json.dumps({"steps": size.steps, "experts": size.experts, "methods": record}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
