"""Every recomputation policy against keeping all: the same gradients to the last bit, fewer bytes, the counted work."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import transformers
from zoo import ZOO

from twofold.kernels import all_ops
from twofold.kernels.flops import count
from twofold.models.decoder import Decoder
from twofold.models.packed import PackedContext
from twofold.models.spec import ModelSpec, Rope
from twofold.models.weights import spec_from
from twofold.train import kept
from twofold.train import loss as losses
from twofold.train.held import held_bytes, layer_numbers
from twofold.train.live import Live
from twofold.train.policies import per_layer
from twofold.train.recompute import recompute_layers

FAMILIES = (
    "llama",
    "gemma2-caps",
    "phi",
    "mixtral",
    "qwen2-moe",
    "qwen3",
    "olmo",
    "olmo2",
    "opt-350m",
    "bloom",
    "cohere",
)
POLICIES = ("none", "selective", "attention", "ffn", "full", "every-2")
LENGTHS = (37, 1, 20)


def spec_of(name: str) -> ModelSpec:
    variant = ZOO[name]
    config = getattr(transformers, variant.architecture).config_class(**variant.config, pad_token_id=0)
    return spec_from(config.to_dict() | {"architectures": [variant.architecture]})


def fresh(spec: ModelSpec) -> Decoder:
    generator = torch.Generator().manual_seed(5)
    decoder = Decoder(spec)
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return decoder


def gradients(decoder: Decoder, lengths: Sequence[int] = LENGTHS) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids, targets = (torch.randint(0, decoder.spec.vocab, (sum(lengths),), generator=generator) for _ in range(2))
    hidden = decoder(ids, PackedContext(lengths))
    losses.backward(decoder, hidden, targets, len(ids), decoder.spec.vocab)
    found = {name: p.grad for name, p in decoder.named_parameters() if p.grad is not None}
    decoder.zero_grad()
    return found


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys() and len(a) > 5
    assert not [name for name in a if not torch.equal(a[name], b[name])]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_policy_has_the_same_gradients(family: str) -> None:
    spec = spec_of(family)
    plain = fresh(spec)
    expected, names = gradients(plain), list(plain.state_dict())
    for policy in POLICIES:
        decoder = fresh(spec)
        recompute_layers(decoder, policy)
        same(gradients(decoder), expected)
        same(gradients(decoder), expected)  # a second step meets nothing of the first
        assert list(decoder.state_dict()) == names


def test_every_policy_has_the_same_gradients_on_the_references() -> None:
    for op in all_ops():
        op.use("together" if op.name == "packed_attention" else "reference")  # whose reference has no gradient
    try:
        test_every_policy_has_the_same_gradients("qwen2-moe")
    finally:
        for op in all_ops():
            op.use(None)


@pytest.mark.parametrize("family", ["llama", "qwen2-moe", "gemma2-caps"])
def test_every_policy_from_disk_has_the_same_gradients(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kept, "SMALLEST", 0)
    monkeypatch.setattr(kept, "SEGMENT", 1 << 16)
    spec = spec_of(family)
    expected = gradients(fresh(spec))
    for policy in POLICIES:
        decoder, disk = fresh(spec), kept.Disk(tmp_path)
        recompute_layers(decoder, policy, keeper=disk)
        same(gradients(decoder), expected)
        size = disk.size
        assert size > 0
        same(gradients(decoder), expected)
        gc.collect()
        assert disk.live == 0 and disk.size == size, "what was read makes room for the next step"
        assert not list(tmp_path.iterdir()), "the file has no name"


def test_layers_may_differ_from_the_rest() -> None:
    spec = spec_of("gemma3")  # seven layers
    decoder = fresh(spec)
    recompute_layers(decoder, "full", {"1-2": "none", "4": "selective", "5": "ffn"})
    replaced = [sorted(vars(layer).keys() & {"forward", "attention", "ffn"}) for layer in decoder.layers]
    assert replaced == [["forward"], [], [], ["forward"], ["forward"], ["ffn"], ["forward"]]
    same(gradients(decoder), gradients(fresh(spec)))


def test_layers_of_another_stage_are_left_alone() -> None:
    decoder = fresh(spec_of("llama"))
    decoder.layers[1] = torch.nn.Identity()
    recompute_layers(decoder, "attention")
    assert "attention" in vars(decoder.layers[0]) and "attention" not in vars(decoder.layers[1])


def held(policy: str, spec: ModelSpec, lengths: Sequence[int]) -> int:
    """Bytes that are alive between forward and backward and were not before."""
    decoder, ids, ctx = fresh(spec), torch.zeros(sum(lengths), dtype=torch.long), PackedContext(lengths)
    recompute_layers(decoder, policy)
    with Live([ids, ctx.positions_T, *decoder.parameters()]) as live:
        hidden = decoder(ids, ctx)
    assert hidden.requires_grad
    return live.total()


@pytest.mark.parametrize("family", [*FAMILIES, "phi-qk-norm", "gpt2", "falcon-40b"])
def test_bytes_between_forward_and_backward_are_those_of_the_forecast(family: str) -> None:
    spec, T = spec_of(family), sum(LENGTHS)
    ropes = {layer.mixer.position for layer in spec.layers if isinstance(layer.mixer.position, Rope)}
    embedding = spec.embedding
    embedded = (embedding.project or 0) + (spec.hidden if embedding.norm else 0) + (2 if embedding.positions else 0)
    turns, last = sum(rope.dim for rope in ropes), spec.hidden * (2 if spec.norm else 1)
    outside = T * (turns + embedded + last)
    for policy in POLICIES:
        forecast = held_bytes(spec, per_layer(policy, len(spec.layers)), T) + 4 * outside
        assert held(policy, spec, LENGTHS) == forecast, policy


def test_the_forecast_of_a_plain_layer_is_the_sum_of_its_parts() -> None:
    layer = spec_of("llama").layers[0]
    D, q, kv, F, H = 40, 40, 20, 53, 4
    numbers = {policy: layer_numbers(layer, D, policy) for policy in POLICIES[:-1]}
    assert numbers == {  # inputs of norms and products, queries and keys turned, what attention made, gates and ups
        "none": 4 * D + (q + kv) + (q + 2 * kv) + (q + H) + 3 * F,
        "selective": 2 * D + (q + 2 * kv) + (q + H) + 2 * F,
        "attention": 3 * D + 3 * F,
        "ffn": 3 * D + (q + kv) + (q + 2 * kv) + (q + H),
        "full": D,
    }


def work(policy: str, family: str = "llama"):
    decoder = fresh(spec_of(family))
    recompute_layers(decoder, policy)
    with count() as found:
        gradients(decoder)
    return found


def test_work_done_again_is_that_of_the_policy() -> None:
    none, some = work("none"), {policy: work(policy) for policy in POLICIES}
    for policy, found in some.items():
        assert (found.forward, found.backward, found.numbers) == (none.forward, none.backward, none.numbers), policy
    assert none.again == none.numbers_again == some["selective"].again == 0
    assert some["selective"].numbers_again > 0
    spec = spec_of("llama")
    D, F, T = spec.hidden, spec.layers[0].ffn.width, sum(LENGTHS)
    last, head, layers = 2 * T * D * F, 2 * T * D * spec.vocab, len(spec.layers)
    assert some["ffn"].again == layers * 2 * last  # gates and ups; what comes down is nobody's to read
    assert some["full"].again == none.forward - head - layers * last
    assert some["attention"].again == some["full"].again - some["ffn"].again - layers * 2 * T * D * D
    assert some["every-2"].again == some["full"].again // 2


def test_the_formulas_count_what_torch_counts_for_the_same_model() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    variant, length = ZOO["llama"], 50
    config = transformers.LlamaConfig(**variant.config, attn_implementation="eager")
    peer = transformers.LlamaForCausalLM(config)
    ids = torch.randint(0, config.vocab_size, (1, length))
    with FlopCounterMode(display=False) as theirs:
        peer(ids, labels=ids).loss.backward()
    spec = spec_of("llama")
    decoder = fresh(spec)
    with count() as ours:
        gradients(decoder, (length,))
    attention = 2 * 2 * spec.layers[0].mixer.q_width * len(spec.layers)  # a pair, forward
    seen, every = length * (length + 1) // 2, length * length
    products = ours.forward + ours.backward - attention * seen * 7 // 2
    assert products == theirs.get_total_flops() - attention * every * 3
