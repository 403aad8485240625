"""The door between siblings: the trainer's samples are spoken by the serving engine, on the weights in training."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from twofold.commands.train import parse_change, sample
from twofold.core import ConfigError
from twofold.models.decoder import Decoder
from twofold.models.packed import PackedContext
from twofold.models.spec import Attention, Gated, Head, LayerSpec, ModelSpec, Names, Norm, Pre, Rope
from twofold.train.config import SampleConfig

RMS = Norm(kind="rms", eps=1e-6)


@pytest.fixture
def decoder() -> Decoder:
    mixer = Attention(heads=4, kv_heads=2, head_dim=8, position=Rope(theta=1e4, dim=8))
    layer = LayerSpec(mixer=mixer, ffn=Gated(width=64, act="silu"), norms=Pre(norm=RMS))
    spec = ModelSpec(
        architecture="Test",
        hidden=32,
        vocab=90,
        layers=(layer, layer),
        norm=RMS,
        head=Head(tied=True),
        names=Names(table={}),
        max_len=64,
    )
    made = Decoder(spec)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return made.train()


def greedy(decoder: Decoder, prompt: list[int], new: int) -> list[int]:
    """One token after another by whole forward passes, the slow way."""
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(new):
            hidden_TD = decoder(torch.tensor(ids), PackedContext([len(ids)]))
            ids.append(int(decoder.logits(hidden_TD[-1:]).argmax()))
    return ids[len(prompt) :]


def test_samples_are_the_models_own_greedy_words(decoder: Decoder) -> None:
    prompts = [[5, 6, 7], [8] * 20, [1]]
    state = torch.get_rng_state()
    found = sample(decoder, prompts, SampleConfig(max_tokens=12), ())
    assert found == [greedy(decoder, prompt, 12) for prompt in prompts]
    assert torch.equal(state, torch.get_rng_state()), "sampling must not touch the run's random state"
    assert all(p.requires_grad and p.grad is None for p in decoder.parameters())


def test_samples_stop_at_the_end_of_text_and_at_the_end_of_the_context(decoder: Decoder) -> None:
    words = greedy(decoder, [5, 6, 7], 12)
    found = sample(decoder, [[5, 6, 7]], SampleConfig(max_tokens=12), (words[4],))
    assert found == [words[: words.index(words[4]) + 1]]
    (long,) = sample(decoder, [[3] * 60], SampleConfig(max_tokens=50), ())
    assert len(long) == 4
    (cut,) = sample(decoder, [[3] * 200], SampleConfig(max_tokens=50), ())
    assert len(cut) == 1


def test_changes_are_toml_where_they_are_toml() -> None:
    assert parse_change("optimizer.lr=3e-4") == ("optimizer.lr", 3e-4)
    assert parse_change('data.train=["a.txt", "b.txt"]') == ("data.train", ["a.txt", "b.txt"])
    assert parse_change("run.output=runs/new") == ("run.output", "runs/new")
    with pytest.raises(ConfigError, match="key=value"):
        parse_change("optimizer.lr")


def test_a_recipe_runs_through_the_door(decoder: Decoder, tmp_path: Path) -> None:
    """An unknown key given with --set ends in one line and exit code 2, before anything is made."""
    from twofold import cli

    recipe = tmp_path / "recipe.toml"
    recipe.write_text('kind = "pretrain"\n[model]\nfrom = "nowhere"\n[data]\ntrain = ["x"]\n[schedule]\nsteps = 1\n')
    assert cli.main(["train", str(recipe), "--set", f"run.output={tmp_path / 'run'}", "--set", "schedule.step=2"]) == 2
    assert not (tmp_path / "run").exists()
