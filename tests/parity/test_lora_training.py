"""Adapters that are trained: gradients, what is frozen, and the engine's bits, which are the trainer's."""

from __future__ import annotations

import pytest
import torch

from tests.parity import tiny
from tests.parity.small_trainer import Numbers, make_trainer
from twofold.core import ConfigError
from twofold.engine import runner
from twofold.kernels import native
from twofold.models import LoraConfig
from twofold.models.decoder import Decoder
from twofold.models.lora import adapt, loras, merge, off, pair_parameters
from twofold.models.packed import PackedContext
from twofold.models.tensors import Weight
from twofold.models.weights import spec_from
from twofold.train import loss as losses
from twofold.train.recompute import recompute_layers
from twofold.train.replicas import Replicas

LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": tiny.VOCAB, "hidden_size": 44,
    "intermediate_size": 61, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 12,
    "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "hidden_act": "silu", "tie_word_embeddings": False,
}  # fmt: skip
GPT2 = {
    "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "vocab_size": tiny.VOCAB, "n_embd": 40, "n_layer": 2,
    "n_head": 4, "n_positions": 512,
}  # fmt: skip
MOE = LLAMA | {
    "architectures": ["Qwen2MoeForCausalLM"], "model_type": "qwen2_moe", "num_experts": 5, "num_experts_per_tok": 2,
    "moe_intermediate_size": 19, "shared_expert_intermediate_size": 27, "hidden_size": 40,
}  # fmt: skip
MOE.pop("head_dim")
SOME = LoraConfig(rank=5, alpha=9.0, targets=("k_proj", "gate_proj", "down_proj"))
MODELS = {
    "llama": (LLAMA, LoraConfig(rank=3), torch.float32),
    "llama-some": (LLAMA, SOME, torch.float32),
    "llama-bf16": (LLAMA, LoraConfig(rank=4, rslora=True), torch.bfloat16),
    "gpt2": (GPT2, LoraConfig(rank=17), torch.float32),
    "moe": (MOE, LoraConfig(rank=2), torch.float32),
    "llama-int8": (LLAMA, LoraConfig(rank=3), "int8"),
    "llama-int4-floats": (LLAMA, LoraConfig(rank=3), "int4-weight-only"),
}


def base_of(name: str) -> Decoder:
    config, _, format = MODELS[name]
    if isinstance(format, str):
        return tiny.rounded(tiny.decoder(spec_from(config)), format)
    return tiny.decoder(spec_from(config), format)


def made(name: str) -> Decoder:
    """An adapted decoder whose adapters say something, and the same whenever it is asked for."""
    decoder = base_of(name)
    adapt(decoder, MODELS[name][1], seed=3)
    decoder.which = name
    source = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for key, parameter in pair_parameters(decoder).items():
            if key.endswith(".b"):
                parameter.copy_(torch.randn(parameter.shape, generator=source) * 0.2)
    return decoder


@pytest.fixture(scope="module", params=MODELS)
def model(request) -> Decoder:
    return made(request.param)


# --------------------------------------------------------------------------------------------- the engine's bits
def test_the_trainers_forward_is_the_engines(model) -> None:
    said = tiny.run(tiny.engine(model), *(tiny.request(i, prompt_logprobs=0, logprobs_mode="raw") for i in range(8)))
    sequences = {f"r{i}": [*tiny.request(i).prompt_ids, *(t.id for t in said[f"r{i}"])] for i in range(8)}
    lengths = [len(ids) for ids in sequences.values()]
    ids_T = torch.tensor([token for ids in sequences.values() for token in ids])
    hidden_TD = model(ids_T, PackedContext(lengths, kv_dtype=model.dtype))
    assert hidden_TD.requires_grad, "the training path, not the serving one"
    trained_T = model.logprobs(hidden_TD[:-1], ids_T[1:], keep=True)
    trained_T = torch.cat([trained_T, trained_T.new_zeros(1)])
    for (name, _), rows in zip(sequences.items(), trained_T.split(lengths), strict=True):
        served = [token.logprob for token in (*said.prompts[name][1:], *said[name])]
        assert rows[:-1].tolist() == served, name


def test_alone_in_chunks_found_and_preempted_are_as_together(model) -> None:
    together = tiny.run(tiny.engine(model), *(tiny.request(i, prompt_logprobs=1) for i in range(10)))
    tight = tiny.engine(model, num_blocks=14)
    pressed = tiny.run(tight, *(tiny.request(i, length=30, max_tokens=40) for i in range(5)))
    assert tight.stats().preemptions > 0
    assert pressed == tiny.run(tiny.engine(model), *(tiny.request(i, length=30, max_tokens=40) for i in range(5)))
    for number in (1, 3):
        alone = tiny.run(tiny.engine(model), tiny.request(number, prompt_logprobs=1))
        assert alone[f"r{number}"] == together[f"r{number}"]
        for chunk in (7, 64):
            cut = tiny.engine(model, max_num_batched_tokens=chunk, max_num_seqs=1)
            parts = tiny.run(cut, tiny.request(number, prompt_logprobs=1))
            assert parts == alone and parts.prompts == alone.prompts
    warm = tiny.engine(model)
    cold = tiny.run(warm, tiny.request(5, length=70))
    again = tiny.request(5, length=70)
    assert tiny.run(warm, again) == cold and again.num_cached == 64


def test_the_program_reads_adapters_where_they_are_and_has_the_bits_of_single_kernels(model, monkeypatch) -> None:
    served = tiny.engine(model, enable_prefix_caching=False)
    assert native.missing() or served.runner.program is not None
    before = tiny.run(served, *(tiny.request(i) for i in range(4)))
    kept = {name: parameter.detach().clone() for name, parameter in pair_parameters(model).items()}
    with torch.no_grad():
        for parameter in pair_parameters(model).values():
            parameter.mul_(-0.7)
    after = tiny.run(served, *(tiny.request(i) for i in range(4)))
    assert after != before
    monkeypatch.setattr(runner, "why_not", lambda decoder: "told so")
    single = tiny.engine(model)
    assert single.runner.program is None
    assert tiny.run(single, *(tiny.request(i) for i in range(4))) == after
    with torch.no_grad():
        for name, parameter in pair_parameters(model).items():
            parameter.copy_(kept[name])


def test_adapters_that_are_off_are_not_there(model) -> None:
    plain = base_of(model.which)
    base = tiny.run(tiny.engine(plain), *(tiny.request(i) for i in range(4)))
    served = tiny.engine(model, enable_prefix_caching=False)
    mine = tiny.run(served, *(tiny.request(i) for i in range(4)))
    assert mine != base
    with off(model):
        assert tiny.run(served, *(tiny.request(i) for i in range(4))) == base, "the program that is there"
        assert tiny.run(tiny.engine(model), *(tiny.request(i) for i in range(4))) == base
    assert tiny.run(served, *(tiny.request(i) for i in range(4))) == mine
    assert all(lora.on for lora in loras(model).values())


# --------------------------------------------------------------------------------------------- gradients
IDS = torch.arange(60) * 37 % tiny.VOCAB
LENGTHS = (40, 20)


def passed(decoder: Decoder) -> None:
    """A forward and a backward pass."""
    hidden_TD = decoder(IDS, PackedContext(LENGTHS))
    losses.backward(decoder, hidden_TD, IDS.roll(-1), 60.0, tiny.VOCAB)


def gradients(decoder: Decoder) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in pair_parameters(decoder).items() if p.grad is not None}


@pytest.mark.parametrize("name", [name for name in MODELS if name not in ("llama-bf16", "llama-int8")])
def test_gradients_are_those_of_the_explicit_weight(name: str) -> None:
    """dL/dA = s Bᵀ (dL/dW) and dL/dB = s (dL/dW) Aᵀ, where W + s B A is the weight itself."""
    decoder, explicit = made(name), tiny.decoder(made(name).spec)
    adapt(explicit, MODELS[name][1])
    with torch.no_grad():
        for place, module in explicit.named_modules():
            if isinstance(module, Weight):
                module.weight.copy_(decoder.get_submodule(place).floats())
        for key, parameter in pair_parameters(explicit).items():
            parameter.copy_(pair_parameters(decoder)[key])
    merge(explicit)
    passed(decoder)
    passed(explicit)
    weights, checked = dict(explicit.named_parameters()), 0
    for place, lora in loras(decoder).items():
        slope_NK = weights[f"{place}.weight"].grad.double()
        for pair in lora.pairs:
            part_nK, s = slope_NK[pair.rows], lora.config.scale
            expected = s * pair.b.double().t() @ part_nK, s * part_nK @ pair.a.double().t()
            for found, wanted in zip((pair.a.grad, pair.b.grad), expected, strict=True):
                assert wanted.abs().max() > 1e-7
                torch.testing.assert_close(found.double(), wanted, rtol=2e-3, atol=2e-4 * float(wanted.abs().max()))
                checked += 1
    assert checked == len(pair_parameters(decoder))
    assert all(p.grad is None for n, p in decoder.named_parameters() if ".lora." not in n), "the base is frozen"


@pytest.mark.parametrize("policy", ["full", "attention", "ffn", "selective"])
def test_recomputed_gradients_are_the_same_bits(model, policy: str) -> None:
    again = made(model.which)
    recompute_layers(again, policy)
    model.zero_grad()
    passed(model)
    passed(again)
    expected, found = gradients(model), gradients(again)
    assert expected.keys() == found.keys() == pair_parameters(model).keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_micro_batches_and_steps_move_adapters_alone(tmp_path) -> None:
    decoder = made("llama")
    before = {name: p.detach().clone() for name, p in decoder.named_parameters()}
    trainer = make_trainer(decoder, tmp_path, Numbers((20, 20, 20, 20), vocab=tiny.VOCAB), micro=40, steps=6)
    whole = make_trainer(made("llama"), tmp_path / "b", Numbers((20, 20, 20, 20), vocab=tiny.VOCAB), steps=6)
    for step in range(4):
        batch = trainer.data.train.batch(step % 2)
        cut, all_at_once = trainer.step(batch), whole.step(batch)
        assert cut.loss == pytest.approx(all_at_once.loss, rel=1e-6)
        assert cut.grad_norm == pytest.approx(all_at_once.grad_norm, rel=1e-4)
    for name, parameter in decoder.named_parameters():
        assert torch.equal(parameter, before[name]) == (".lora." not in name), name
    assert trainer.optimizer.weights.keys() == pair_parameters(decoder).keys()
    assert Replicas.suit(decoder, None), "stage 0 needs no FSDP2"


def test_first_values_are_of_the_seed_and_the_name_alone() -> None:
    def first(targets: tuple[str, ...], seed: int) -> dict[str, torch.Tensor]:
        decoder = tiny.decoder(spec_from(LLAMA))
        adapt(decoder, LoraConfig(rank=4, targets=targets), seed)
        return {name: p.detach() for name, p in pair_parameters(decoder).items()}

    every, some, other = first((), 1), first(("v_proj",), 1), first(("v_proj",), 2)
    for name, value in some.items():
        assert torch.equal(value, every[name])
        assert torch.equal(value, other[name]) == name.endswith(".b")
        if name.endswith(".a"):
            assert 0.8 * 44**-0.5 < value.abs().max() <= 44**-0.5
        else:
            assert not value.any()


def test_a_quantized_base_lets_the_gradient_through_and_cannot_be_merged() -> None:
    """int8 activations are rounded on the way, and the gradient goes as if they had not been."""
    decoder, close = made("llama-int8"), made("llama-int4-floats")
    passed(decoder)
    assert all(grad.abs().max() > 0 for grad in gradients(decoder).values())
    with pytest.raises(ConfigError, match="is quantized: load the float checkpoint"):
        merge(close)
    exact, rounded = made("llama"), gradients(decoder)
    passed(exact)
    for name, grad in gradients(exact).items():
        cosine = torch.nn.functional.cosine_similarity(grad.flatten(), rounded[name].flatten(), 0)
        assert cosine > 0.97, name
