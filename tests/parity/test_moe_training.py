"""A mixture in training: the losses are transformers', the noise is a token's own, and serving never knows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
import zoo
from tiny import SPECS, decoder
from torch import Tensor

from twofold.core import ConfigError
from twofold.kernels import all_ops
from twofold.models import load, load_tensors, save
from twofold.models.decoder import Decoder
from twofold.models.packed import PackedContext
from twofold.train import loss as losses
from twofold.train.moe import Routers
from twofold.train.moe_config import MoeConfig
from twofold.train.recompute import recompute_layers

EVERYTHING = MoeConfig(balance_loss=0.5, z_loss=0.2, capacity=1.0, min_capacity=1, noise="gumbel", over="micro")
VOCAB = 131
LENGTHS = (40, 7, 33, 20)


def batch(vocab: int = VOCAB) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, vocab, (sum(LENGTHS),), generator=generator)
    return ids, torch.randint(0, vocab, ids.shape, generator=generator)


def step(
    model: Decoder, config: MoeConfig, cuts: tuple[int, ...] = (4,), number: int = 3, scale: float = 1.0
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Gradients and figures of one step, `cuts` the sequences of each micro-batch."""
    ids, targets = batch(model.spec.vocab)
    model.zero_grad()
    routers = Routers(model, config, seed=11)
    routers.begin(number, len(ids), scale)
    at = sequence = 0
    for count in cuts:
        lengths = LENGTHS[sequence : sequence + count]
        place = slice(at, at + sum(lengths))
        hidden_TD = model(ids[place], PackedContext(lengths, places_T=torch.arange(at, place.stop)))
        losses.backward(model, hidden_TD, targets[place], len(ids), model.spec.vocab)
        at, sequence = place.stop, sequence + count
    figures = routers.end()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}, figures


# ---------------------------------------------------------------------------------------------------- transformers
@pytest.mark.parametrize("name", ["mixtral", "qwen2-moe", "qwen3-moe"])
def test_the_balance_loss_has_the_gradients_of_transformers(tmp_path: Path, name: str) -> None:
    """In one layer its formula is ours times the experts of a token: it averages layers before it multiplies."""
    config = zoo.ZOO[name].config | {"num_hidden_layers": 1, "output_router_logits": True, "router_aux_loss_coef": 0.7}
    theirs = zoo.build(zoo.Variant(architecture=zoo.ZOO[name].architecture, config=config)).train()
    theirs.save_pretrained(tmp_path)
    ids = torch.tensor([zoo.prompt_of(zoo.ZOO[name])])
    out = theirs(ids, labels=ids)
    out.loss.backward()

    ours = load(tmp_path)
    routers = Routers(ours, MoeConfig(balance_loss=0.7 * 2), seed=0)
    routers.begin(0, ids.shape[1])
    hidden_TD = ours(ids[0], PackedContext((ids.shape[1],)))
    targets = torch.cat((ids[0, 1:], torch.tensor([losses.IGNORE])))
    losses.backward(ours, hidden_TD, targets, ids.shape[1] - 1, ours.spec.vocab)
    assert routers.end()["moe_balance"] * 2 == pytest.approx(float(out.aux_loss.detach()), rel=1e-5)

    wanted = Decoder(ours.spec)
    load_tensors(wanted, ((key, p.grad) for key, p in theirs.named_parameters()))
    for (key, parameter), other in zip(ours.named_parameters(), wanted.parameters()):
        torch.testing.assert_close(parameter.grad, other.detach(), atol=1e-5, rtol=1e-3, msg=key)


def test_the_losses_are_added_to_the_trainers_by_autograd() -> None:
    """Against one graph of everything, its router logits caught on the way; `scale` is the loss scaler's."""
    model, (ids, targets) = decoder(SPECS["moe"]), batch()
    caught: list[Tensor] = []
    handle = model.layers[0].router.register_forward_hook(lambda _, __, out: caught.append(out))
    hidden_TD = model(ids, PackedContext(LENGTHS))
    handle.remove()
    (logits,) = caught
    p, lse = logits.softmax(-1), logits.logsumexp(-1)
    f = torch.bincount(p.topk(2).indices.flatten(), minlength=6) / (2 * len(ids))
    aux = 0.5 * 6 * (p.mean(0) * f).sum() + 0.2 * lse.square().mean()
    main = -model.logprobs(hidden_TD, targets).sum() / len(ids)
    truth = torch.autograd.grad(main + 8.0 * aux, list(model.parameters()))
    found, figures = step(model, MoeConfig(balance_loss=0.5, z_loss=0.2), scale=8.0)
    for (name, grad), wanted in zip(found.items(), truth, strict=True):
        torch.testing.assert_close(grad, wanted, atol=1e-5, rtol=1e-4, msg=name)
    assert figures["moe_balance"] == pytest.approx(float(6 * (p.detach().mean(0) * f).sum()), rel=1e-5)
    assert figures["moe_z"] == pytest.approx(float(lse.detach().square().mean()), rel=1e-5)
    assert figures["moe_busiest"] == pytest.approx(float(f.max()))


# ------------------------------------------------------------------------------------------------- what changes what
@pytest.mark.parametrize("config", [MoeConfig(), EVERYTHING, MoeConfig(balance_loss=1.0, noise="jitter")])
def test_running_layers_again_changes_no_bit_and_counts_nothing_twice(config: MoeConfig) -> None:
    cuts = (1, 2, 1)
    kept, figures = step(decoder(SPECS["moe"]), config, cuts)
    again = decoder(SPECS["moe"])
    recompute_layers(again)
    found, same = step(again, config, cuts)
    assert figures == same
    for name, grad in kept.items():
        assert torch.equal(grad, found[name]), name


@pytest.mark.parametrize("noise", ["gumbel", "jitter"])
def test_micro_batches_change_neither_the_noise_nor_the_z_loss(noise: str) -> None:
    config = MoeConfig(z_loss=0.3, noise=noise, jitter=0.3)
    whole, figures = step(decoder(SPECS["moe"]), config)
    parts, same = step(decoder(SPECS["moe"]), config, (1, 2, 1))
    assert same == pytest.approx(figures, rel=1e-6)
    for name, grad in whole.items():
        torch.testing.assert_close(parts[name], grad, atol=1e-5, rtol=1e-4, msg=name)
    quiet, _ = step(decoder(SPECS["moe"]), MoeConfig(z_loss=0.3))
    other, _ = step(decoder(SPECS["moe"]), config, number=4)
    for different in (quiet, other):
        assert not torch.allclose(different["layers.0.experts.down.weight"], whole["layers.0.experts.down.weight"])


def test_over_the_step_the_last_micro_batch_is_judged_by_all() -> None:
    """One micro-batch: both definitions agree. Several: they differ, and only in what the losses do."""
    over_step, over_micro = (MoeConfig(balance_loss=2.0, over=over) for over in ("step", "micro"))
    one, figures = step(decoder(SPECS["moe"]), over_step)
    same, told = step(decoder(SPECS["moe"]), over_micro)
    assert figures == told and all(torch.equal(one[name], same[name]) for name in one)
    cut, figures = step(decoder(SPECS["moe"]), over_step, (1, 1, 1, 1))
    alone, told = step(decoder(SPECS["moe"]), over_micro, (1, 1, 1, 1))
    assert figures["moe_busiest"] == told["moe_busiest"]
    assert figures["moe_balance"] != told["moe_balance"]
    assert not torch.equal(cut["layers.0.router.weight"], alone["layers.0.router.weight"])


def test_capacity_drops_what_the_figures_say() -> None:
    _, roomy = step(decoder(SPECS["moe"]), MoeConfig(capacity=6.0))
    grads, tight = step(decoder(SPECS["moe"]), MoeConfig(capacity=0.5, min_capacity=1))
    assert roomy["moe_dropped"] == 0.0
    assert tight["moe_dropped"] == pytest.approx((200 - 6 * 17) / 200)  # all six are full at 17 of 200 choices
    assert tight["moe_busiest"] == roomy["moe_busiest"]  # counted before anything is dropped
    assert all(torch.isfinite(grad).all() for grad in grads.values())


# ----------------------------------------------------------------------------------------------------------- serving
@torch.no_grad()
def test_outside_a_step_and_without_rules_the_bits_are_those_that_are_served() -> None:
    model, (ids, _) = decoder(SPECS["moe"]), batch()
    served = model(ids, PackedContext(LENGTHS))
    routers = Routers(model, EVERYTHING, seed=0)
    assert torch.equal(model(ids, PackedContext(LENGTHS)), served)
    routers.begin(0, len(ids))
    assert not torch.equal(model(ids, PackedContext(LENGTHS)), served)
    routers.end()
    assert torch.equal(model(ids, PackedContext(LENGTHS)), served)
    plain = Routers(model, MoeConfig(), seed=0)
    plain.begin(0, len(ids))
    assert torch.equal(model(ids, PackedContext(LENGTHS)), served)
    assert plain.end().keys() == {"moe_busiest"}


ERNIE = {
    "architectures": ["Ernie4_5_MoeForCausalLM"],
    "model_type": "ernie4_5_moe",
    "vocab_size": 131,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "moe_num_experts": 6,
    "moe_k": 2,
    "moe_intermediate_size": 12,
    "moe_num_shared_experts": 1,
    "max_position_embeddings": 128,
    "tie_word_embeddings": True,
    "rope_theta": 10000.0,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_biases_that_training_moved_choose_in_transformers_too(tmp_path: Path, dtype: torch.dtype) -> None:
    (tmp_path / "config.json").write_text(json.dumps(ERNIE))
    from twofold.models import read_spec

    model = Decoder(read_spec(tmp_path), dtype=dtype)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    before = [layer.choice.bias.clone() for layer in model.layers[1:]]
    for number in range(5):
        step(model, MoeConfig(bias_rate=0.02), number=number)
    for layer, bias in zip(model.layers[1:], before):
        assert layer.choice.bias.dtype == torch.float32
        assert not torch.equal(layer.choice.bias, bias)
    save(model, tmp_path, config=ERNIE)
    again = load(tmp_path, dtype=dtype)
    for layer, other in zip(model.layers[1:], again.layers[1:]):
        assert torch.equal(layer.choice.bias, other.choice.bias)
    ids = batch()[0][:100]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    with torch.no_grad():
        ours = again.logits(again(ids, PackedContext((100,))))
        torch.testing.assert_close(ours, theirs(ids[None]).logits[0], atol=1e-4, rtol=1e-4)
        for layer in again.layers[1:]:
            layer.choice.bias.zero_()
        assert not torch.allclose(again.logits(again(ids, PackedContext((100,)))), ours, atol=1e-2)


def test_rules_for_no_mixture_and_biases_for_no_family_are_refused() -> None:
    Routers(decoder(SPECS["llama"]), MoeConfig(), seed=0)
    with pytest.raises(ConfigError, match=r"Tiny has no mixture of experts: take the table \[moe\] out"):
        Routers(decoder(SPECS["llama"]), MoeConfig(z_loss=0.1), seed=0)
    with pytest.raises(ConfigError, match=r"moe.bias_rate: checkpoints of Tiny have no bias.*Ernie4_5_Moe"):
        Routers(decoder(SPECS["moe"]), MoeConfig(bias_rate=0.1), seed=0)


def test_every_kernel_route_takes_biases_alike() -> None:
    logits, bias = torch.randn(300, 19) * 2, torch.randn(19) * 0.05
    (route,) = (op for op in all_ops() if op.name == "route")
    for renormalise in (False, True):
        weights, chosen = route.reference(logits, 4, renormalise, bias)
        share, choice = route(logits, 4, renormalise, bias)
        differs = (chosen != choice).any(-1)  # probabilities of equal merit up to a rounding
        assert float(differs.float().mean()) < 0.02
        torch.testing.assert_close(share[~differs], weights[~differs], atol=1e-6, rtol=1e-5)
        assert torch.equal(route(logits[57:58], 4, renormalise, bias)[1][0], choice[57])
