"""Tensor parallel, Ulysses, ring and their products with ZeRO give the losses and gradients of one process."""

from __future__ import annotations

import pytest
import torch
from test_zero import CONFIG, batch
from torch import Tensor
from world import run_ranks

from twofold.core import ConfigError
from twofold.models.cuts import local_spec
from twofold.models.decoder import Decoder
from twofold.models.weights import spec_from
from twofold.parallel import Layout, Mesh, ParallelConfig
from twofold.parallel.layout import lay_out
from twofold.train import loss as losses
from twofold.train.axes import Axes
from twofold.train.config import OptimizerConfig
from twofold.train.init import init_weights
from twofold.train.optimizer import Optimizer
from twofold.train.zero import Zero

LLAMA = CONFIG | {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 8}
GEMMA = LLAMA | {
    "architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2",
    "hidden_activation": "gelu_pytorch_tanh", "hidden_act": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 16, "sliding_window": 8, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0,
}  # fmt: skip
QWEN = LLAMA | {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "tie_word_embeddings": False}
MOE = LLAMA | {
    "architectures": ["Qwen2MoeForCausalLM"], "model_type": "qwen2_moe", "num_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 16, "shared_expert_intermediate_size": 24, "norm_topk_prob": True,
    "decoder_sparse_step": 1, "tie_word_embeddings": False,
}  # fmt: skip
BLOOM = {
    "architectures": ["BloomForCausalLM"], "model_type": "bloom", "vocab_size": 97, "hidden_size": 32, "n_layer": 2,
    "n_head": 4, "layer_norm_epsilon": 1e-5,
}  # fmt: skip
MODELS = {"llama": LLAMA, "gemma2": GEMMA, "qwen3": QWEN, "moe": MOE, "bloom": BLOOM}


def train(rank: int, model: str, layout: Layout, config: ParallelConfig, steps: int) -> list[tuple[float, float]]:
    """(loss, gradient norm) of every step."""
    torch.manual_seed(0)
    mesh = Mesh(layout, rank)
    axes = Axes(mesh, config)
    spec = spec_from(MODELS[model])
    whole = Decoder(spec)
    init_weights(whole, 5)
    with torch.no_grad():
        for number, p in enumerate(whole.parameters()):  # biases and norms that matter
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(number)), alpha=0.05)
    source = dict(whole.named_parameters())
    decoder = axes.divide(spec)
    with torch.no_grad():
        for name, p in decoder.named_parameters():
            p.copy_(axes.part(name, source[name]))
    pipeline = axes.pipeline
    zero = Zero(decoder, mesh, roots=pipeline.stages if pipeline else ())
    optimizer = Optimizer(decoder.named_parameters(), OptimizerConfig(lr=1e-2), norm=axes.norm)
    told = []
    for step in range(steps):
        one = batch(step % 2)
        targets = int((one.targets_T != losses.IGNORE).sum())
        parts = axes.share(one, None)
        summed = 0.0
        if pipeline:
            summed = pipeline.run([axes.place(part) for part in parts], targets, decoder, losses.next_token)
        for number, part in enumerate([] if pipeline else parts, 1):
            zero.micro_batch(last=number == len(parts))
            ids, wanted, ctx = axes.place(part)
            hidden = decoder(ids, ctx)
            summed += losses.backward(decoder, hidden, wanted, targets, 97)
        axes.collect(decoder)
        norm = optimizer.clip()
        told.append((mesh.sum("loss", summed)[0] / targets, norm))
        optimizer.step(1e-2)
        optimizer.zero()
    return told


def same(model: str, config: ParallelConfig, world: int, steps: int = 6) -> None:
    alone = train(0, model, Layout(), ParallelConfig(), steps)
    for told in run_ranks(world, train, model, lay_out(config, world), config, steps):
        for (loss, norm), (loss_alone, norm_alone) in zip(told, alone):
            assert loss == pytest.approx(loss_alone, rel=1e-5)
            assert norm == pytest.approx(norm_alone, rel=1e-4)
    assert alone[-1][0] < alone[(steps - 1) % 2][0]


@pytest.mark.parametrize("model", MODELS)
def test_tensor_parallel(model: str) -> None:
    same(model, ParallelConfig(tp=2), 2)


@pytest.mark.parametrize("model", ["qwen3", "moe"])
def test_with_tokens_divided_too(model: str) -> None:
    same(model, ParallelConfig(tp=2, sequence=True), 2)


@pytest.mark.parametrize("kind", ["ulysses", "ring"])
@pytest.mark.parametrize("model", ["llama", "gemma2", "bloom"])
def test_sequence_parallel(model: str, kind) -> None:
    same(model, ParallelConfig(sp=2, sp_kind=kind), 2)


DEEP = LLAMA | {"num_hidden_layers": 4}
MODELS["deep"] = DEEP
MODELS["deep_untied"] = DEEP | {"tie_word_embeddings": False}


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
@pytest.mark.parametrize("model", ["gemma2", "deep_untied"])
def test_pipeline(model: str, schedule) -> None:
    same(model, ParallelConfig(pp=2, pp_schedule=schedule), 2)


@pytest.mark.parametrize("schedule", ["interleaved", "zero_bubble"])
@pytest.mark.parametrize("model", ["deep", "deep_untied"])
def test_pipeline_of_several_stages_a_rank(model: str, schedule) -> None:
    same(model, ParallelConfig(pp=2, pp_schedule=schedule, pp_stages=2), 2)


PRODUCTS = [
    ParallelConfig(pp=4),
    ParallelConfig(pp=2, zero=3),
    ParallelConfig(pp=2, zero=1, pp_schedule="zero_bubble", pp_stages=2),
    ParallelConfig(pp=2, tp=2, sequence=True),
    ParallelConfig(pp=2, sp=2, pp_schedule="interleaved", pp_stages=2),
    ParallelConfig(tp=4),
    ParallelConfig(tp=2, zero=3),
    ParallelConfig(tp=2, zero=1, sequence=True),
    ParallelConfig(tp=2, sp=2, zero=3),
    ParallelConfig(tp=2, sp=2, sp_kind="ring", sequence=True),
    ParallelConfig(sp=2, zero=2),
    ParallelConfig(sp=2, zero=0, sp_kind="ring"),
    ParallelConfig(sp=4, zero=3),
    ParallelConfig(sp=4, sp_kind="ring", zero=1),
]


@pytest.mark.parametrize(
    "config", PRODUCTS, ids=lambda c: f"pp{c.pp}{c.pp_schedule}-tp{c.tp}-{c.sp_kind}{c.sp}-zero{c.zero}"
)
def test_products_on_four_ranks(config: ParallelConfig) -> None:
    same("deep", config, 4, steps=4)


EXPERTS = [
    ParallelConfig(ep=2, zero=3),
    ParallelConfig(ep=4, zero=2),
    ParallelConfig(ep=2, tp=2, zero=1),
    ParallelConfig(ep=2, sp=2, tp=2, sequence=True),
    ParallelConfig(ep=2, pp=2, zero=1),
]


@pytest.mark.parametrize("config", EXPERTS, ids=lambda c: f"ep{c.ep}-pp{c.pp}-tp{c.tp}-sp{c.sp}-zero{c.zero}")
def test_experts_divided(config: ParallelConfig) -> None:
    same("moe", config, 4, steps=4)


def test_an_illegal_division_names_the_nearest() -> None:
    with pytest.raises(
        ConfigError, match="8 query heads, which 3 ranks cannot share evenly; the nearest that can is 2"
    ):
        local_spec(spec_from(LLAMA), 3, 0)
    spec = spec_from(CONFIG)
    with pytest.raises(ConfigError, match='the nearest that can is 2, or take sp_kind = "ring"'):
        Axes(FakeMesh(), ParallelConfig(sp=4)).divide(spec)


class FakeMesh(Mesh):
    """Four sequence parallel ranks, of which none is there."""

    def __init__(self) -> None:
        self.layout, self.rank_in_world, self._groups = Layout(sp=4), 0, {}


def gradient_of_table(rank: int) -> Tensor:
    """The embedding's gradient of a rank of two, as the whole one has it."""
    mesh = Mesh(Layout(tp=2), rank)
    axes = Axes(mesh, ParallelConfig(tp=2))
    spec = spec_from(LLAMA)
    whole = Decoder(spec)
    init_weights(whole, 5)
    decoder = axes.divide(spec)
    assert axes.tensor is not None
    axes.tensor.fill(whole)
    one = batch(1)
    ids, wanted, ctx = axes.place(one)
    losses.backward(decoder, decoder(ids, ctx), wanted, 10, 97)
    assert decoder.embed.weight.grad is not None
    return decoder.embed.weight.grad


def test_each_rank_has_its_rows_of_the_tables_gradient() -> None:
    spec = spec_from(LLAMA)
    whole = Decoder(spec)
    init_weights(whole, 5)
    axes = Axes()
    ids, wanted, ctx = axes.place(batch(1))
    losses.backward(whole, whole(ids, ctx), wanted, 10, 97)
    parts = run_ranks(2, gradient_of_table)
    assert [len(part) for part in parts] == [49, 48]
    torch.testing.assert_close(torch.cat(parts), whole.embed.weight.grad, atol=1e-6, rtol=1e-4)
