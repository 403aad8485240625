"""Truly on-policy: a rollout's log-probabilities are the trainer's, by bits, whatever happened on the way.

Every rollout here was made with prompts in chunks, prefixes found, requests preempted, and tools in between, which is
asserted.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.parity import tiny
from tests.parity.bare_words import BareWords, prompt
from twofold.align.rollout import rollout
from twofold.engine.sampling import SamplingParams
from twofold.kernels import all_ops, native
from twofold.models.packed import PackedContext
from twofold.models.spec import Head

WORDS = BareWords()
QWEN3 = replace(tiny.LLAMA, mixer=tiny._attention(qk_norm="head", qk_norm_kind=tiny.RMS))
SPECS = tiny.SPECS | {
    "qwen3": replace(tiny.SPECS["llama"], layers=(QWEN3, QWEN3)),
    "multiplied": replace(tiny.SPECS["gemma2"], head=Head(tied=True, multiplier=0.37, softcap=9.0)),
}
FP32, BF16, INT8 = torch.float32, torch.bfloat16, torch.int8
NAMES = {FP32: "float32", BF16: "bfloat16", INT8: "int8"}
NATIVE = pytest.mark.skipif(bool(native.missing()), reason=native.missing())
CASES = [
    *((name, dtype, FP32) for name in ("llama", "qwen3", "gemma2", "multiplied", "moe") for dtype in (FP32, BF16)),
    *((name, BF16, BF16) for name in ("qwen3", "gemma2", "moe", "alibi", "sparse")),
    *(pytest.param(name, BF16, INT8, marks=NATIVE) for name in ("qwen3", "gemma2")),
]


def disturbed(model, kv_dtype, temperature, **more):
    """Rollouts of an engine that is short of blocks and seats; some id ends a turn every now and then."""
    tight = {"num_blocks": 10, "max_num_seqs": 8, "max_num_batched_tokens": 16}
    engine = tiny.engine(model, kv_dtype=NAMES[kv_dtype], **tight)
    ends = tuple(range(90, 94))
    params = SamplingParams(temperature=temperature, max_tokens=None, stop_token_ids=ends, ignore_eos=True, **more)
    prompts = [prompt(number, length) for number, length in enumerate((40, 53, 9))]
    groups = list(rollout(engine, prompts, 4, params, seed=11, words=WORDS, turn=tool, max_turns=99, max_total=60))
    stats = engine.stats()
    assert stats.preemptions > 0 and stats.prefix_hits > 0 and stats.steps > 53 // 16
    rollouts = [each for group in groups for each in group.rollouts]
    assert any(False in each.mine for each in rollouts), "a tool said something"
    return rollouts


def tool(_, messages):
    return (50, 51, 52)


def trained(model, rollouts, kv_dtype, temperature) -> list[list[float]]:
    """What the trainer computes for the tokens behind each prompt, in one packed batch with gradients."""
    sequences = [[*each.prompt.ids, *each.ids] for each in rollouts]
    lengths = [len(ids) for ids in sequences]
    ids_T = torch.tensor([token for ids in sequences for token in ids])
    model.train()
    hidden_TD = model(ids_T, PackedContext(lengths, kv_dtype=kv_dtype))
    assert hidden_TD.requires_grad, "the training path, not the serving one"
    found_T = model.logprobs(hidden_TD[:-1], ids_T[1:], keep=True, temperature=temperature)
    found_T = torch.cat([found_T, found_T.new_zeros(1)])
    return [
        rows[len(each.prompt.ids) - 1 : -1].tolist()
        for each, rows in zip(rollouts, found_T.split(lengths), strict=True)
    ]


def k3(rollouts, found) -> float:
    """Mean of exp(r) - 1 - r over the model's own tokens (Schulman 2020)."""
    pairs = [
        (new, old)
        for each, row in zip(rollouts, found, strict=True)
        for new, old, mine in zip(row, each.logprobs, each.mine, strict=True)
        if mine
    ]
    ratio = torch.tensor([old - new for new, old in pairs])
    return float((ratio.exp() - 1 - ratio).mean())


@pytest.mark.parametrize(("name", "dtype", "kv_dtype"), CASES)
def test_the_trainer_gives_a_rollouts_tokens_the_same_bits(name, dtype, kv_dtype):
    model = tiny.decoder(SPECS[name], dtype)
    rollouts = disturbed(model, kv_dtype, 1.3)
    found = trained(model, rollouts, kv_dtype, 1.3)
    for each, row in zip(rollouts, found, strict=True):
        assert [p for p, mine in zip(row, each.mine) if mine] == [
            p for p, mine in zip(each.logprobs, each.mine) if mine
        ]
    assert k3(rollouts, found) == 0.0
    assert k3(rollouts, trained(model, rollouts, kv_dtype, 1.0)) > 1e-4, "the temperature matters"


@pytest.mark.parametrize("kernels", ["native", "reference"])
@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.3])
@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("name", ["llama", "multiplied"])
def test_at_every_temperature_and_with_the_definitions_alone(name, dtype, temperature, kernels):
    if kernels == "reference":
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        for op in all_ops():
            op.use("reference")
    elif native.missing():
        pytest.skip(native.missing())
    try:
        model = tiny.decoder(SPECS[name], dtype)
        rollouts = disturbed(model, FP32, temperature)
        assert k3(rollouts, trained(model, rollouts, FP32, temperature)) == 0.0
    finally:
        if kernels == "reference":
            torch.set_num_threads(before)
            for op in all_ops():
                op.use(None)


def test_a_cut_rollout_has_the_likelihoods_of_the_plain_distribution():
    """With top-p, top-k, min-p and penalties a rollout is off-policy by choice; what it reports is comparable still."""
    model = tiny.decoder(SPECS["llama"])
    cut = {"top_p": 0.8, "top_k": 20, "min_p": 0.01, "repetition_penalty": 1.2, "logit_bias": {9: 2.0}}
    rollouts = disturbed(model, FP32, 0.7, **cut)
    assert k3(rollouts, trained(model, rollouts, FP32, 0.7)) == 0.0


def test_new_weights_in_the_middle_make_the_tokens_after_them():
    """A token's likelihood is that of the weights whose version it carries, whatever made the tokens before it."""
    model = tiny.decoder(SPECS["qwen3"])
    engine = tiny.engine(model, num_blocks=40, max_num_seqs=4)
    params = SamplingParams(max_tokens=48, temperature=0.7)
    prompts = [prompt(number, 20 + number) for number in range(6)]
    weights = [{name: weight.detach().clone() for name, weight in model.named_parameters()}]

    rollouts = []
    for group in rollout(engine, prompts, 2, params, seed=4, words=WORDS):
        rollouts += group.rollouts
        with torch.no_grad():
            for weight in model.parameters():
                weight.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(len(rollouts))) * 0.01)
        weights.append({name: weight.detach().clone() for name, weight in model.named_parameters()})
        engine.load_weights(None, len(weights) - 1)
    for version, state in enumerate(weights):
        with torch.no_grad():
            for name, weight in model.named_parameters():
                weight.copy_(state[name])
        found = trained(model, rollouts, FP32, 0.7)
        for each, row in zip(rollouts, found, strict=True):
            own = [(new, old) for new, old, made in zip(row, each.logprobs, each.versions) if made == version]
            assert all(new == old for new, old in own)
    assert any(len(set(each.versions)) > 1 for each in rollouts), "weights came while some were running"
