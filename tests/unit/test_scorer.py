"""RewardModel: bits that hang on no neighbour, what it refuses; it makes no text, a score head is not lost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from twofold.align.preference_config import RewardModelConfig
from twofold.align.reward import BradleyTerry
from twofold.align.scorer import RewardModel
from twofold.commands.plan import plan
from twofold.commands.quantize import quantize
from twofold.core import CheckpointError, ConfigError, RequestError
from twofold.data import Batch
from twofold.engine.capacity import forecast, weight_bytes
from twofold.engine.config import EngineConfig
from twofold.engine.engine import Engine
from twofold.engine.llm import LLM
from twofold.models import Decoder, PackedContext, decoder_tensors, load, load_tensors, read_formats, save, spec_from
from twofold.models.cuts import WHOLE, cuts, local_spec
from twofold.models.quantized import formats, quantize_weights
from twofold.models.scoring import as_causal, as_critic, as_reward
from twofold.quant.config import Reading, Recipe
from twofold.serve.model import load_model
from twofold.serve.wire import Start
from twofold.train.forecast import Cut, Load, groups_of, memory
from twofold.train.init import init_weights

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 32,
    "intermediate_size": 44,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 61,
    "max_position_embeddings": 64,
}
REWARD = as_reward(LLAMA)
CRITIC = as_critic(LLAMA)


def made(config: dict[str, Any], dtype: torch.dtype = torch.float32) -> Decoder:
    decoder = Decoder(spec_from(config), dtype=dtype)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return decoder


def texts(count: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(count)
    lengths = torch.randint(1, 64, (count,), generator=generator).tolist()
    return [torch.randint(1, 61, (length,), generator=generator).tolist() for length in lengths]


# ------------------------------------------------------------------------------------------------ scores
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_score_has_its_own_bits(dtype: torch.dtype) -> None:
    decoder, asked = made(REWARD, dtype), texts(23)
    together = RewardModel(decoder)(asked)
    assert len(set(together)) == len(asked)
    assert [RewardModel(decoder)([ids])[0] for ids in asked] == together
    assert RewardModel(decoder, tokens=50)(asked) == together
    assert RewardModel(decoder)(asked[::-1])[::-1] == together
    assert RewardModel(decoder)([]) == []


def test_padding_behind_a_text_is_not_read() -> None:
    judge, asked = RewardModel(made(REWARD), pad=0), texts(5)
    assert judge([ids + [0] * 80 for ids in asked]) == judge(asked)
    assert judge([[0, 0, 0]]) == judge([[0]])
    assert RewardModel(judge.decoder)([[5, 0]]) != judge([[5, 0]])


@pytest.mark.parametrize("pad", [None, 0])
def test_training_reads_the_token_that_is_scored(pad: int | None) -> None:
    decoder, asked = made(REWARD), [[5, 9, 0], [3, 0, 0], [0], [7, 0, 4], [1], [1]]
    lengths = tuple(len(ids) for ids in asked)
    ids_T = torch.tensor([token for ids in asked for token in ids])
    batch = Batch(ids_T=ids_T, targets_T=ids_T, lengths=lengths)
    rows = BradleyTerry(RewardModelConfig(), pad).rows(batch)
    with torch.no_grad():
        scores = decoder.scores(decoder(ids_T, PackedContext(lengths)))[rows, 0].tolist()
    assert scores == RewardModel(decoder, pad=pad)(asked)
    assert rows.tolist() == ([2, 5, 6, 9, 10, 11] if pad is None else [1, 3, 6, 9, 10, 11])


@pytest.mark.parametrize("ids", [[], [1] * 65, [61], [-1]])
def test_a_text_that_cannot_be_read_is_named(ids: list[int]) -> None:
    with pytest.raises(RequestError, match="text 1 has"):
        RewardModel(made(REWARD))([[1], ids])


def test_only_one_number_is_a_reward() -> None:
    with pytest.raises(ConfigError, match="no score head"):
        RewardModel(made(LLAMA))
    with pytest.raises(ConfigError, match="3 labels"):
        RewardModel(made(as_reward(LLAMA, 3)))


# ------------------------------------------------------------------------------------------------ config.json
def test_what_config_says() -> None:
    assert spec_from(LLAMA).score is None
    assert spec_from(CRITIC).score == 1 and spec_from(CRITIC).head == spec_from(LLAMA).head
    reward = spec_from(as_reward(CRITIC, 3))
    assert reward.architecture == "LlamaForSequenceClassification" and reward.head is None and reward.score == 3
    assert as_causal(CRITIC) == LLAMA and as_reward(REWARD) == REWARD
    two = {key: value for key, value in REWARD.items() if key not in ("id2label", "label2id")}
    assert spec_from(two).score == 2 and spec_from(two | {"num_labels": 5, "problem_type": "regression"}).score == 5


def test_what_config_may_not_say() -> None:
    with pytest.raises(CheckpointError, match="make them agree"):
        spec_from(REWARD | {"num_labels": 2})
    with pytest.raises(CheckpointError, match="take 'value_head' out"):
        spec_from(REWARD | {"value_head": True})
    with pytest.raises(CheckpointError, match="did you mean 'LlamaForSequenceClassification'"):
        spec_from(REWARD | {"architectures": ["LlamaForSequenceClasification"]})
    for grow in (as_critic, as_causal):
        with pytest.raises(ConfigError, match="no language head"):
            grow(REWARD)


# ------------------------------------------------------------------------------------------------ all that walk weights
def test_a_reward_model_makes_no_text(tmp_path: Path) -> None:
    decoder = made(REWARD)
    save(decoder, tmp_path, config=REWARD)
    asks = [
        lambda: LLM(tmp_path, runner="generate"),
        lambda: load_model(Start(model=str(tmp_path), engine={"runner": "generate"})),
        lambda: plan(tmp_path, EngineConfig(runner="generate")),
        lambda: quantize(tmp_path, tmp_path / "out", Recipe(), Reading()),
        lambda: Engine(decoder, EngineConfig(num_blocks=4)),
        lambda: forecast(decoder.spec, EngineConfig(), 1 << 32),
        lambda: decoder.logits(torch.zeros(1, 32)),
        lambda: decoder.entropy(torch.zeros(1, 32)),
    ]
    for ask in asks:
        with pytest.raises(ConfigError, match="LlamaForSequenceClassification is a reward model"):
            ask()
    with pytest.raises(ConfigError, match="no score head"):
        made(LLAMA).scores(torch.zeros(1, 32))


@pytest.mark.parametrize("config", [REWARD, CRITIC], ids=["reward", "critic"])
def test_first_weights(config: dict[str, Any]) -> None:
    """A score head starts as zeros; all else is what it is without one."""
    decoder, plain = made(config), made(LLAMA)
    for each in (decoder, plain):
        init_weights(each, 11)
    assert not decoder.score.weight.any()
    others = dict(plain.named_parameters())
    for name, parameter in decoder.named_parameters():
        assert name == "score.weight" or torch.equal(parameter, others[name])


@pytest.mark.parametrize("config", [REWARD, CRITIC], ids=["reward", "critic"])
def test_tensors_by_name_go_there_and_back(config: dict[str, Any]) -> None:
    decoder, other = made(config), Decoder(spec_from(config))
    load_tensors(other, decoder_tensors(decoder))
    assert all(torch.equal(x, other.get_parameter(name)) for name, x in decoder.named_parameters())
    lacking = [(name, x) for name, x in decoder_tensors(decoder) if name != "score.weight"]
    with pytest.raises(CheckpointError, match=r"lacks 'score.weight'"):
        load_tensors(other, lacking)


def test_a_causal_engine_takes_a_critics_tensors_and_no_others() -> None:
    critic, plain = made(CRITIC), Decoder(spec_from(LLAMA))
    load_tensors(plain, decoder_tensors(critic))
    assert torch.equal(plain.head.weight, critic.head.weight)
    with pytest.raises(CheckpointError, match=r"left-over tensor 'score.bias'"):
        load_tensors(plain, [*decoder_tensors(critic), ("score.bias", torch.zeros(1))])
    with pytest.raises(CheckpointError, match=r"left-over tensor 'lm_head.weight'"):
        load_tensors(Decoder(spec_from(REWARD)), decoder_tensors(critic))


@pytest.mark.parametrize("config", [REWARD, CRITIC], ids=["reward", "critic"])
def test_quantizing_leaves_the_score_head_as_it_is(config: dict[str, Any], tmp_path: Path) -> None:
    decoder = made(config)
    kept = decoder.score.weight.detach().clone()
    quantize_weights(decoder, formats(decoder, "int8"))
    save(decoder, tmp_path, config=config)
    places = read_formats(tmp_path)
    assert "layers.1.down" in places and "score" not in places and ("head" in places) == (config is CRITIC)
    back = load(tmp_path)
    assert torch.equal(back.score.weight, kept)
    hidden = torch.randn(3, 32)
    assert torch.equal(back.scores(hidden), decoder.scores(hidden))


@pytest.mark.parametrize("config", [REWARD, CRITIC], ids=["reward", "critic"])
def test_bytes_and_ranks_count_the_score_head(config: dict[str, Any]) -> None:
    spec = spec_from(config)
    numbers = sum(p.numel() for p in Decoder(spec, device="meta").parameters())
    assert sum(group.numbers for group in groups_of(spec, 1)) == numbers
    assert sum(group.numbers for index in range(2) for group in groups_of(spec, 1, [index])) == numbers
    work = Load(tokens=512, policies=("none", "none"))
    found, plain = memory(spec, Cut(), work), memory(spec_from(LLAMA), Cut(), work)
    more = 4 * (32 - (0 if spec.head else 61 * 32))
    assert found.kept - plain.kept == 3 * more
    assert (found.peak.total < plain.peak.total) == (spec.head is None)
    assert weight_bytes(spec, torch.float32) >= 4 * numbers
    assert cuts(spec).get("score.weight", WHOLE) == WHOLE and local_spec(spec, 2, 1).score == 1
