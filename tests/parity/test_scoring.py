"""Reward models of every family against transformers, and critics: a score head beside the language head."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import transformers

from tests.parity import zoo
from twofold.align.scorer import RewardModel
from twofold.core import CheckpointError, ConfigError
from twofold.engine.config import EngineConfig
from twofold.engine.engine import Engine
from twofold.engine.request import Request
from twofold.engine.sampling import SamplingParams
from twofold.models import Decoder, PackedContext, load, read_config, read_spec, save
from twofold.models.scoring import CAUSAL, as_causal, as_critic, as_reward
from twofold.models.whole import WholeParameters

TOLERANCE = 2e-4
OURS_ALONE = {"Cohere", "Ernie4_5_Moe", "Granite"}
ROWS = {
    "llama-biases-tied": 1, "mistral-window": 2, "mixtral": 1, "qwen2": 3, "qwen2-moe": 1, "qwen3": 1, "qwen3-moe": 2,
    "gemma": 1, "gemma2-caps": 2, "gemma3": 1, "phi": 1, "phi3": 1, "gpt2": 2, "gpt-neox": 1, "gptj": 1, "opt": 1,
    "opt-350m": 2, "bloom": 1, "falcon-40b": 1, "stablelm": 1, "starcoder2": 1, "olmo": 1, "olmo2": 3,
}  # fmt: skip
"""A variant of the zoo to the labels that its score head has."""


@dataclass(frozen=True)
class Pair:
    """One reward model in both libraries."""

    path: Path
    theirs: transformers.PreTrainedModel
    ours: Decoder
    prompt: list[int]


@pytest.fixture(scope="module", params=sorted(ROWS))
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    variant = zoo.ZOO[request.param]
    name = next(reward for reward, causal in CAUSAL.items() if causal == variant.architecture)
    path = tmp_path_factory.mktemp("rewards")
    config = variant.config | {"num_labels": ROWS[request.param]}
    theirs = zoo.save(zoo.Variant(architecture=name, config=config), path)
    return Pair(path, theirs, load(path, max_len=variant.max_len), zoo.prompt_of(variant))


def test_every_reward_model_of_transformers_is_in_the_table() -> None:
    there = {name for name in CAUSAL if hasattr(transformers, name)}
    tried = {zoo.ZOO[name].architecture for name in ROWS}
    assert {CAUSAL[name] for name in there} == tried
    assert {name.removesuffix("ForSequenceClassification") for name in set(CAUSAL) - there} == OURS_ALONE


def test_scores_of_the_last_token(pair: Pair) -> None:
    ids = torch.tensor(pair.prompt)
    with torch.no_grad():
        theirs = pair.theirs(ids[None]).logits[0]
        ours = pair.ours.scores(pair.ours(ids, PackedContext([len(ids)])))
    assert theirs.abs().max() > 50 * TOLERANCE
    assert ours.shape == (len(ids), pair.ours.spec.score) and ours.dtype == torch.float32
    assert (ours[-1] - theirs).abs().max() < TOLERANCE


def test_export_is_what_transformers_loads(pair: Pair, tmp_path: Path) -> None:
    save(pair.ours, tmp_path, config=read_config(pair.path))
    back, info = type(pair.theirs).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    expected, found = pair.theirs.state_dict(), back.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_padding_is_not_scored(pair: Pair) -> None:
    """transformers scores the rightmost token that is not the padding's; the zoo's padding is 0."""
    if pair.ours.spec.score != 1:
        with pytest.raises(ConfigError, match="labels"):
            RewardModel.load(pair.path)
        return
    texts = [pair.prompt, pair.prompt[:7], pair.prompt[:19]]
    padded = torch.zeros(3, len(pair.prompt), dtype=torch.int64)
    for row, ids in zip(padded, texts, strict=True):
        row[: len(ids)] = torch.tensor(ids)
    with torch.no_grad():
        theirs = pair.theirs(padded, attention_mask=(padded != 0).long()).logits[:, 0].tolist()
    judge = RewardModel.load(pair.path)
    assert judge(texts) == judge(padded.tolist())
    assert judge(texts) == pytest.approx(theirs, abs=TOLERANCE)


# ------------------------------------------------------------------------------------------------ other heads
@pytest.fixture(scope="module")
def causal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("causal")
    zoo.save(zoo.ZOO["qwen3"], path)
    return path


def critic_of(causal: Path, path: Path) -> Decoder:
    config = as_critic(read_config(causal))
    decoder = load(causal, wanted=config)
    assert not decoder.score.weight.any()
    with torch.no_grad():
        decoder.score.weight.normal_(generator=torch.Generator().manual_seed(3))
    save(decoder, path, config=config)
    return decoder


def test_a_causal_model_becomes_a_reward_model(causal: Path, tmp_path: Path) -> None:
    config = as_reward(read_config(causal))
    decoder, before = load(causal, wanted=config), load(causal)
    assert decoder.spec.head is None and not hasattr(decoder, "head") and not decoder.score.weight.any()
    whole = WholeParameters(causal, wanted=config)
    for name, parameter in decoder.named_parameters():
        assert torch.equal(whole[name], parameter)
        assert name == "score.weight" or torch.equal(before.get_parameter(name), parameter)
    save(decoder, tmp_path, config=config)
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert theirs.num_labels == 1 and type(theirs).__name__ == "Qwen3ForSequenceClassification"
    assert load(tmp_path, wanted=as_reward(config, labels=4)).score.weight.shape == (4, decoder.spec.hidden)
    with pytest.raises(CheckpointError, match=r"lacks 'lm_head.weight'"):
        load(tmp_path, wanted=read_config(causal))
    with pytest.raises(CheckpointError, match=r"lacks 'lm_head.weight'"):
        WholeParameters(tmp_path, wanted=read_config(causal))


def test_a_critic_is_also_the_causal_model(causal: Path, tmp_path: Path) -> None:
    """There and back with its values; without the key in its config it is what it was, for both libraries."""
    config, critic = as_critic(read_config(causal)), critic_of(causal, tmp_path)
    assert torch.equal(load(tmp_path).score.weight, critic.score.weight)
    assert torch.equal(WholeParameters(tmp_path)["score.weight"], critic.score.weight)
    assert torch.equal(load(tmp_path, wanted=as_causal(config)).head.weight, critic.head.weight)
    ids = torch.tensor(zoo.prompt_of(zoo.ZOO["qwen3"]))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    hidden = critic(ids, PackedContext([len(ids)]))
    assert (critic.logits(hidden) - theirs(ids[None]).logits[0]).abs().max() < TOLERANCE
    save(critic, tmp_path, config=config)
    (tmp_path / "config.json").write_text((causal / "config.json").read_text())
    plain = load(tmp_path)
    assert plain.spec == read_spec(causal) and plain.spec.score is None
    assert torch.equal(plain.head.weight, critic.head.weight)


def test_a_critic_is_served_as_its_causal_model_is(causal: Path, tmp_path: Path) -> None:
    critic, plain = critic_of(causal, tmp_path), load(causal)
    said = [_answer(decoder) for decoder in (critic, plain)]
    assert said[0] == said[1] and len(said[0]) == 12


def _answer(decoder: Decoder) -> list[tuple[int, float | None]]:
    engine = Engine(decoder, EngineConfig(num_blocks=12, max_num_batched_tokens=64, max_num_seqs=4))
    params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True, logprobs=1)
    engine.submit(Request(id="one", prompt_ids=tuple(zoo.prompt_of(zoo.ZOO["qwen3"])), params=params))
    out: list[tuple[int, float | None]] = []
    while engine.has_work:
        out += [(token.id, token.logprob) for output in engine.step() for token in output.tokens]
    return out
