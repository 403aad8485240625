"""The forecast of a rank's bytes, against what is alive: after building, at the fullest time of a step, after it."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
from world import run_ranks

from twofold.data import Batch
from twofold.models.decoder import Decoder
from twofold.models.packed import PackedContext
from twofold.models.weights import spec_from
from twofold.parallel import Layout, Mesh, ParallelConfig
from twofold.parallel.layout import lay_out
from twofold.train import loss as losses
from twofold.train.axes import Axes
from twofold.train.collectives import Collectives
from twofold.train.config import OptimizerConfig
from twofold.train.forecast import Cut, Load, memory
from twofold.train.init import init_weights
from twofold.train.optimizer import Optimizer
from twofold.train.policies import per_layer
from twofold.train.recompute import recompute_layers
from twofold.train.share import share
from twofold.train.storages import Storages
from twofold.train.traffic import traffic
from twofold.train.zero import Zero

LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 1001, "hidden_size": 64,
    "intermediate_size": 176, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "hidden_act": "silu", "tie_word_embeddings": True,
}  # fmt: skip
TOKENS, LENGTH = 128, 64
WITHIN = 0.05
Rule = Literal["adamw", "lion", "sgd"]
CASES = [
    (dtype, policy, parts, tied)
    for dtype in ("fp32", "bf16")
    for policy, parts, tied in (("none", 1, True), ("full", 1, False), ("none", 3, False), ("full", 2, True))
]


def measure(rank: int, layout: Layout, dtype: str, policy: str, parts: int, tied: bool, rule: Rule) -> dict[str, int]:
    """Bytes alive after building, at the peak of a later step, and after it.

    The least of two peaks: gloo's own thread may hold a buffer for a moment after it is done.
    """
    size = torch.bfloat16 if dtype == "bf16" else torch.float32
    with Storages() as alive:
        mesh = Mesh(layout, rank)
        divided = mesh.size("data") > 1
        decoder = Decoder(spec_from(LLAMA | {"tie_word_embeddings": tied}), dtype=torch.float32 if divided else size)
        init_weights(decoder, 5)
        recompute_layers(decoder, policy)
        zero = Zero(decoder, mesh, size if divided and size != torch.float32 else None)
        optimizer = Optimizer(decoder.named_parameters(), OptimizerConfig(name=rule), norm=Axes(mesh).norm)
        built = alive.now()
        steps = [step(alive, mesh, decoder, zero, optimizer, parts) for _ in range(3)]
    return {"built": built, "peak": min(peak for peak, _ in steps[1:]), "kept": steps[-1][1]}


def step(
    alive: Storages, mesh: Mesh, decoder: Decoder, zero: Zero, optimizer: Optimizer, parts: int
) -> tuple[int, int]:
    ids = torch.randint(0, 1001, (TOKENS * mesh.size("data") * parts,))
    batch = Batch(ids_T=ids, targets_T=ids.roll(-1), lengths=(LENGTH,) * (len(ids) // LENGTH))
    data = 2 * ids.nbytes
    micro = share(batch, mesh.size("data"), mesh.rank("data"), TOKENS)
    assert len(micro) == parts
    with alive.during() as peak:
        for number, part in enumerate(micro, 1):
            zero.micro_batch(last=number == parts)
            hidden_TD = decoder(part.ids_T, PackedContext(part.lengths))
            losses.backward(decoder, hidden_TD, part.targets_T, 100.0, 1001)
            optimizer.collect()
        del hidden_TD
        optimizer.clip()
        optimizer.step(1e-2)
    optimizer.zero()
    return peak[0] - data, alive.now() - data


def measure_all(rank: int, layout: Layout, cases: list[tuple[str, str, int, bool]]) -> list[dict[str, int]]:
    return [measure(rank, layout, *case, "adamw") for case in cases]


def check(layout: Layout, found: dict[str, int], dtype: str, policy: str, parts: int, tied: bool, states: int) -> None:
    spec = spec_from(LLAMA | {"tie_word_embeddings": tied})
    load = Load(
        tokens=TOKENS, parts=parts, size=2 if dtype == "bf16" else 4, states=states,
        policies=tuple(per_layer(policy, len(spec.layers))),
    )  # fmt: skip
    said = memory(spec, Cut.of(layout, in_place=dtype == "fp32"), load)
    for name, value in (("built", said.built), ("kept", said.kept), ("peak", said.peak.total)):
        assert value == pytest.approx(found[name], rel=WITHIN), (name, said.peak)


@pytest.mark.parametrize(
    ("world", "zero"), [(2, 0), (2, 1), (2, 2), (2, 3), (4, 0), (4, 1), (4, 2), (4, 3), (4, "hybrid")]
)
def test_every_stage(world: int, zero: Any) -> None:
    layout = lay_out(ParallelConfig(zero=zero, node=2), world)
    cases = CASES if world == 2 else CASES[::3]  # one of each dtype, policy and number of micro-batches
    ranks = run_ranks(world, measure_all, layout, cases)
    for case, found in zip(cases, ranks[0], strict=True):
        check(layout, found, *case, 2)


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_alone(case: tuple[str, str, int, bool]) -> None:
    check(Layout(), measure(0, Layout(), *case, "adamw"), *case, 2)


@pytest.mark.parametrize(("rule", "states"), [("lion", 1), ("sgd", 0)])
def test_rules_that_keep_less(rule: Rule, states: int) -> None:
    case = ("fp32", "none", 1, True)
    check(Layout(), measure(0, Layout(), *case, rule), *case, states)


def send(rank: int, layout: Layout, config: ParallelConfig, parts: int) -> int:
    """Bytes that a rank sends in a step."""
    mesh = Mesh(layout, rank)
    axes = Axes(mesh, config)
    decoder = axes.divide(spec_from(LLAMA))
    init_weights(decoder, 5)
    zero = Zero(decoder, mesh, config=config)
    ids = torch.randint(0, 1001, (TOKENS * mesh.size("data") * parts,))
    batch = Batch(ids_T=ids, targets_T=ids.roll(-1), lengths=(LENGTH,) * (len(ids) // LENGTH))
    micro = axes.share(batch, TOKENS)
    with Collectives() as said:
        for number, part in enumerate(micro, 1):
            zero.micro_batch(last=number == parts)
            ids_T, targets_T, ctx = axes.place(part)
            losses.backward(decoder, decoder(ids_T, ctx), targets_T, 100.0, decoder.spec.vocab)
    return sum(total.sent for total in said.found.values())


@pytest.mark.parametrize(
    "config",
    [
        ParallelConfig(zero=0),
        ParallelConfig(zero=3),
        ParallelConfig(zero="hybrid", node=2),
        ParallelConfig(zero=2, comm="int4"),
        ParallelConfig(zero=2, comm="int8", tp=2),
        ParallelConfig(zero=3, sp=2),
        ParallelConfig(zero=3, sp=2, sp_kind="ring"),
    ],
    ids=str,
)
def test_bytes_sent(config: ParallelConfig) -> None:
    layout, spec = lay_out(config, 4), spec_from(LLAMA)
    load = Load(tokens=TOKENS // layout.sp, parts=2, policies=tuple(per_layer("none", len(spec.layers))))
    said = traffic(spec, layout, config, load)
    measured = run_ranks(4, send, layout, config, 2)[0]
    assert sum(said.values()) == pytest.approx(measured, rel=0.03), said
