"""Every rule against torch.optim or its paper, in fp64; cut into slices; and which rule is for which tensor."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from twofold.core import ConfigError
from twofold.kernels.optimizer import Shard, orthogonalised
from twofold.models.decoder import Decoder
from twofold.models.layout import matrices
from twofold.models.spec import Attention, Gated, Head, LayerSpec, Mixture, ModelSpec, Names, Norm, Pre
from twofold.train.config import RULES, OptimizerConfig
from twofold.train.optimizer import Optimizer
from twofold.train.peers import Alone
from twofold.train.rules import Adagrad, Adam, AdamW, Lamb, Lion, Muon, Rule, Sgd, rules_for

STEPS, RATE = 20, 0.02
SHAPES = ((24, 16), (7,), (16, 40))
DECAY = (0.1, 0.0, 0.03)
ALL = ((slice(None),),)
MUON = {"momentum": 0.95, "nesterov": True, "adjust": "original", "parts": {str(n): ALL for n in range(3)}}


def numbers(seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in SHAPES]


def run(rule: Rule, dtype: torch.dtype, which: Sequence[int] = (0, 1, 2), scale: float = 0.5) -> list[Tensor]:
    """The weights after STEPS updates; gradients are drawn anew for each."""
    weights = [numbers(0)[n].to(dtype) for n in which]
    states = [tuple(torch.zeros_like(w) for _ in rule.states) for w in weights]
    for step in range(1, STEPS + 1):
        grads = [numbers(step)[n].to(dtype) for n in which]
        shards = [
            Shard(w, g, kept, step, DECAY[n], str(n))
            for n, w, g, kept in zip(which, weights, grads, states, strict=True)
        ]
        rule.step(shards, RATE, scale)
    return weights


def torchs(make: Callable[[list[dict[str, Any]]], torch.optim.Optimizer], which: Sequence[int]) -> list[Tensor]:
    weights = [torch.nn.Parameter(numbers(0)[n]) for n in which]
    optimizer = make([{"params": [w], "weight_decay": DECAY[n]} for n, w in zip(which, weights, strict=True)])
    for step in range(1, STEPS + 1):
        for n, weight in zip(which, weights, strict=True):
            weight.grad = 0.5 * numbers(step)[n]
        optimizer.step()
    return [w.detach() for w in weights]


def lions(which: Sequence[int]) -> list[Tensor]:
    """Algorithm 2 of Chen et al. 2023, a number at a time."""
    out = []
    for n in which:
        w, m = numbers(0)[n], torch.zeros(SHAPES[n], dtype=torch.float64)
        for step in range(1, STEPS + 1):
            g = 0.5 * numbers(step)[n]
            c = 0.9 * m + 0.1 * g
            w = w - RATE * (torch.sign(c) + DECAY[n] * w)
            m = 0.99 * m + 0.01 * g
        out.append(w)
    return out


def lambs(which: Sequence[int]) -> list[Tensor]:
    """Algorithm 2 of You et al. 2020, the ratio kept between 0.01 and 1.5."""
    out = []
    for n in which:
        w, m, v = numbers(0)[n], 0.0, 0.0
        for step in range(1, STEPS + 1):
            g = 0.5 * numbers(step)[n]
            m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
            u = m / (1 - 0.9**step) / ((v / (1 - 0.999**step)).sqrt() + 1e-6) + DECAY[n] * w
            w = w - RATE * min(max(float(w.norm() / u.norm()), 0.01), 1.5) * u
        out.append(w)
    return out


def muons(which: Sequence[int]) -> list[Tensor]:
    """Jordan's program in fp64."""
    out = []
    for n in which:
        w, m = numbers(0)[n], torch.zeros(SHAPES[n], dtype=torch.float64)
        for step in range(1, STEPS + 1):
            g = 0.5 * numbers(step)[n]
            m = 0.95 * m + 0.05 * g
            x = 0.05 * g + 0.95 * m
            x = x / x.norm()
            for _ in range(5):
                a = x @ x.T
                x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
            w = w * (1 - RATE * DECAY[n]) - RATE * max(1, w.shape[0] / w.shape[1]) ** 0.5 * x
        out.append(w)
    return out


ADAM = {"betas": (0.9, 0.95), "eps": 1e-8}
EVERY, MATRICES = (0, 1, 2), (0, 2)
CASES: dict[str, tuple[Rule, Sequence[int], Callable[[Sequence[int]], list[Tensor]]]] = {
    "adamw": (AdamW(**ADAM), EVERY, lambda which: torchs(lambda p: torch.optim.AdamW(p, lr=RATE, **ADAM), which)),
    "adam": (Adam(**ADAM), EVERY, lambda which: torchs(lambda p: torch.optim.Adam(p, lr=RATE, **ADAM), which)),
    "sgd": (
        Sgd(momentum=0.0, nesterov=False),
        EVERY,
        lambda which: torchs(lambda p: torch.optim.SGD(p, lr=RATE), which),
    ),
    "momentum": (
        Sgd(momentum=0.9, nesterov=False),
        EVERY,
        lambda which: torchs(lambda p: torch.optim.SGD(p, lr=RATE, momentum=0.9), which),
    ),
    "nesterov": (
        Sgd(momentum=0.9, nesterov=True),
        EVERY,
        lambda which: torchs(lambda p: torch.optim.SGD(p, lr=RATE, momentum=0.9, nesterov=True), which),
    ),
    "adagrad": (Adagrad(eps=1e-10), EVERY, lambda which: torchs(lambda p: torch.optim.Adagrad(p, lr=RATE), which)),
    "lion": (Lion(betas=(0.9, 0.99)), EVERY, lions),
    "lamb": (Lamb(betas=(0.9, 0.999), eps=1e-6, trust=(0.01, 1.5)), EVERY, lambs),
    "muon": (Muon(**MUON), MATRICES, muons),
}


@pytest.mark.parametrize("name", CASES)
def test_the_formula_is_the_published_one(name: str) -> None:
    """In fp64 to 1e-12 of the largest weight after twenty steps; Newton-Schulz amplifies roundings to 1e-10."""
    rule, which, truth = CASES[name]
    bound = 1e-10 if name == "muon" else 1e-12
    for mine, right in zip(run(rule, torch.float64, which), truth(which), strict=True):
        assert float((mine - right).abs().max()) <= bound * float(right.abs().max())


@pytest.mark.parametrize("name", CASES)
def test_fp32_stays_within_a_rounding_a_step(name: str) -> None:
    """Twenty steps in fp32 are within 20 roundings (2.4e-6) of fp64; Newton-Schulz amplifies its own to 1e-4."""
    rule, which, truth = CASES[name]
    bound = 1e-4 if name == "muon" else STEPS * 2**-23
    for mine, right in zip(run(rule, torch.float32, which), truth(which), strict=True):
        assert float((mine.double() - right).abs().max()) <= bound * max(1.0, float(right.abs().max()))


def test_muon_is_torchs_muon_but_for_its_bf16() -> None:
    ours = run(Muon(**MUON), torch.float32, MATRICES)
    theirs = torchs(lambda p: torch.optim.Muon(p, lr=RATE, adjust_lr_fn="original"), MATRICES)
    for n, mine, right in zip(MATRICES, ours, theirs, strict=True):
        moved = float((right - numbers(0)[n]).norm())
        assert float((mine.double() - right).norm()) < 0.03 * moved


@pytest.mark.parametrize("name", [name for name, (rule, *_) in CASES.items() if rule.elementwise])
def test_tiles_of_an_elementwise_rule_have_the_bits_of_the_whole(name: str) -> None:
    rule = CASES[name][0]
    whole = torch.randn(1000)
    tiled = whole.clone()
    kept = [tuple(torch.zeros(1000) for _ in rule.states) for _ in range(2)]
    for step in range(1, 4):
        grad = torch.randn(1000)
        rule.step([Shard(whole, grad, kept[0], step, 0.1)], RATE, 0.5)
        for first in range(0, 1000, 333):
            at = slice(first, first + 333)
            rule.step([Shard(tiled[at], grad[at], tuple(k[at] for k in kept[1]), step, 0.1)], RATE, 0.5)
    assert torch.equal(whole, tiled)


class Together:
    """Peers of threads: each says what it has, and all wait for the others."""

    def __init__(self, ranks: int) -> None:
        self.ranks, self.barrier, self.said = ranks, threading.Barrier(ranks), dict[int, Tensor]()
        self.me = threading.local()

    def _all(self, mine: Tensor) -> list[Tensor]:
        self.said[self.me.rank] = mine.clone()
        self.barrier.wait(10)
        found = [self.said[rank] for rank in range(self.ranks)]
        self.barrier.wait(10)
        return found

    def sum(self, names: Sequence[str], values: Tensor) -> Tensor:
        return torch.stack(self._all(values)).sum(0)

    def gather(self, name: str, shard: Tensor) -> Tensor:
        return torch.cat(self._all(shard))

    def scatter(self, name: str, whole: Tensor) -> Tensor:
        return whole.tensor_split(self.ranks)[self.me.rank]


def on_ranks(make: Callable[[Together], Rule], ranks: int) -> Tensor:
    peers = Together(ranks)
    rule, parts = make(peers), [x.clone() for x in numbers(0)[0].tensor_split(ranks)]

    def one(rank: int) -> None:
        peers.me.rank = rank
        states = tuple(torch.zeros_like(parts[rank]) for _ in rule.states)
        for step in range(1, STEPS + 1):
            grad = numbers(step)[0].tensor_split(ranks)[rank].contiguous()
            rule.step([Shard(parts[rank], grad, states, step, DECAY[0], "0")], RATE, 0.5)

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    return torch.cat(parts)


@pytest.mark.parametrize("ranks", [2, 3])
def test_lamb_and_muon_in_slices_are_lamb_and_muon(ranks: int) -> None:
    muon = on_ranks(lambda peers: Muon(**MUON, peers=peers), ranks)
    assert torch.equal(muon, run(Muon(**MUON), torch.float64, (0,))[0])
    settings = {"betas": (0.9, 0.999), "eps": 1e-6, "trust": (0.01, 1.5)}
    lamb = on_ranks(lambda peers: Lamb(**settings, peers=peers), ranks)
    torch.testing.assert_close(lamb, run(Lamb(**settings), torch.float64, (0,))[0], rtol=1e-12, atol=1e-12)


def test_orthogonalised_keeps_directions_and_levels_their_lengths() -> None:
    for shape in ((30, 12), (12, 30), (16, 16), (1, 9)):
        matrix = torch.randn(shape) * 37.0
        u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
        turned = orthogonalised(matrix)
        along = u.T @ turned @ vh.T
        assert turned.dtype == torch.float32 and turned.shape == matrix.shape
        torch.testing.assert_close(along - along.diag().diag(), torch.zeros_like(along), rtol=0, atol=2e-4)
        if shape != (16, 16):  # a square one has singular values near 0, which five steps do not lift
            assert float(along.diag().min()) > 0.6 and float(along.diag().max()) < 1.3
    assert torch.equal(orthogonalised(torch.zeros(4, 3)), torch.zeros(4, 3))


def test_the_parts_of_a_fused_weight_are_turned_alone() -> None:
    parts = ((slice(0, 8),), (slice(8, 12),), (slice(12, 24),))
    fused = run(Muon(**{**MUON, "parts": {"0": parts}}), torch.float64, (0,))[0]
    for (rows,) in parts:
        weight, mean = numbers(0)[0][rows].clone(), torch.zeros_like(numbers(0)[0][rows])
        alone = Muon(**{**MUON, "parts": {"x": ALL}})
        for step in range(1, STEPS + 1):
            alone.step([Shard(weight, numbers(step)[0][rows], (mean,), step, DECAY[0], "x")], RATE, 0.5)
        assert torch.equal(fused[rows], weight)


def decoder_of_both_kinds() -> Decoder:
    mixer, norm = Attention(heads=4, kv_heads=2, head_dim=8), Norm(kind="rms", eps=1e-6)
    mixture = Mixture(experts=3, top_k=2, width=12, act="silu", shared_width=20)
    layers = [LayerSpec(mixer=mixer, ffn=ffn, norms=Pre(norm=norm)) for ffn in (Gated(width=24, act="silu"), mixture)]
    return Decoder(
        ModelSpec(
            architecture="Tiny",
            hidden=32,
            vocab=50,
            layers=tuple(layers),
            norm=norm,
            head=Head(tied=True),
            names=Names(table={}),
            max_len=64,
        )
    )


def test_a_decoders_matrices_are_cut_as_the_checkpoint_names_them() -> None:
    model = decoder_of_both_kinds()
    found = matrices(model)
    qkv = [(slice(0, 32),), (slice(32, 48),), (slice(48, 64),)]
    pair = [(slice(0, 24),), (slice(24, 48),)]
    assert {name: list(at) for name, at in found.items() if name.startswith("layers.0.")} == {
        "layers.0.qkv.weight": qkv,
        "layers.0.out.weight": [(slice(0, 32),)],
        "layers.0.gate_up.weight": pair,
        "layers.0.down.weight": [(slice(0, 32),)],
    }
    assert len(found["layers.1.experts.gate_up.weight"]) == 6 and len(found["layers.1.experts.down.weight"]) == 3
    assert found["layers.1.experts.gate_up.weight"][3] == (1, slice(12, 24))
    assert "layers.1.shared_gate.weight" not in found and "embed.weight" not in found
    for name, parts in found.items():  # every number is in one part
        seen = torch.zeros(model.get_parameter(name).shape)
        for at in parts:
            seen[at] += 1
        assert bool((seen == 1).all()), name


def test_muon_leaves_what_is_no_matrix_of_a_layer_to_adamw() -> None:
    model = decoder_of_both_kinds()
    names = [name for name, _ in model.named_parameters()]
    config = OptimizerConfig(name="muon", lr=0.02, adamw_lr=0.004)
    (muon, mine), (adamw, rest) = rules_for(config, names, matrices=matrices(model), peers=Alone())
    assert isinstance(muon, Muon) and isinstance(adamw, AdamW) and adamw.share == pytest.approx(0.2)
    assert sorted(mine + rest) == sorted(names) and set(mine) == set(matrices(model))
    assert {"embed.weight", "norm.weight", "layers.1.shared_gate.weight"} <= set(rest)
    with pytest.raises(ConfigError, match="has none: choose adamw"):
        rules_for(config, ["weight"], peers=Alone())


@pytest.mark.parametrize("name", RULES)
def test_every_name_makes_a_rule_with_its_own_numbers(name: str) -> None:
    config = OptimizerConfig(name=name)
    rule, _ = rules_for(config, ["m"], matrices={"m": ALL}, peers=Alone())[0]
    assert type(rule).__name__.lower() == name
    for key, value in config.numbers().items():
        if key not in ("weight_decay", "adamw_lr", "betas", "eps") or name != "muon":
            assert key == "weight_decay" or getattr(rule, key) == value


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"momentum": 0.9}, r"optimizer\.momentum means nothing to adamw: it is for sgd, muon"),
        (
            {"name": "lion", "eps": 1e-8},
            r"optimizer\.eps means nothing to lion: it is for adamw, adam, lamb, adagrad, muon",
        ),
        ({"name": "sgd", "trust": (0.1, 1.0)}, r"optimizer\.trust means nothing to sgd: it is for lamb"),
        ({"name": "sgd", "nesterov": True}, "needs optimizer.momentum"),
        ({"name": "lamb", "trust": (2.0, 1.0)}, "rising"),
        ({"name": "sgd", "momentum": 1.0}, r"must be in \[0, 1\)"),
        ({"weight_decay": -1.0}, "0 or more"),
    ],
)
def test_a_number_that_the_rule_does_not_take_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        OptimizerConfig(**given)


def test_frozen_squares_stand_still_and_count_as_they_were() -> None:
    weight, config = torch.randn(40), OptimizerConfig(lr=0.1, betas=(0.8, 0.9), weight_decay=0.0, freeze_step=2)
    optimizer = Optimizer([("w", weight.clone().requires_grad_())], config)
    mean, square, truth = torch.zeros(40), torch.zeros(40), weight.clone()
    for step in range(1, 6):
        grad = torch.randn(40)
        optimizer.weights["w"].grad = grad.clone()
        optimizer.step(0.1)
        mean = 0.8 * mean + 0.2 * grad
        if step <= 2:
            square = 0.9 * square + 0.1 * grad**2
        root = (square / (1 - 0.9 ** min(step, 2))).sqrt() + 1e-8
        truth -= 0.1 * mean / (1 - 0.8**step) / root
        torch.testing.assert_close(optimizer.weights["w"].detach(), truth, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(optimizer.kept["w"]["exp_avg_sq"], square)
