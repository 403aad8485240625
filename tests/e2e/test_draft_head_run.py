"""`twofold train` with a [draft_head] table: a head learns, killed or not, on a rank or two, and is served."""

from __future__ import annotations

import io
import logging
import shutil
from pathlib import Path

import pytest
from ranks import Run, read_losses
from rich.console import Console
from safetensors.torch import load_file
from tiny_recipe import SENTENCES, bits, kill_after, write_recipe

from twofold import LLM, SamplingParams
from twofold.core import ConfigError, load_config
from twofold.models import load, read_config
from twofold.models.draft_head import digest
from twofold.train import launch
from twofold.train.config import Recipe
from twofold.train.journal import read_rows
from twofold.train.planning import Machine, plan, spec_of

HEAD = {"draft_head.depth": 2, "draft_head.token_weight": 1.0}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    """A recipe that begins with a model that was trained a little."""
    folder = tmp_path_factory.mktemp("recipe")
    fresh = write_recipe(folder)
    assert launch.run(fresh, {"schedule.steps": 40, "run.output": str(folder / "base")}) == 0
    text, model = fresh.read_text(), f'[model]\nfrom = "{folder / "base" / "model"}"'
    begin, end = text.index("[model.config]"), text.index("[data]")
    path = folder / "head.toml"
    path.write_text(text[:begin].replace("[model]", model) + text[end : text.index("[sample]")])
    return path


def run_here(recipe: Path, output: Path, **changes) -> str:
    said = io.StringIO()
    changed = {key.replace("__", "."): value for key, value in changes.items()}
    assert (
        launch.run(recipe, {**HEAD, "run.output": str(output), **changed}, console=Console(file=said, width=200)) == 0
    )
    return said.getvalue()


@pytest.fixture(scope="module")
def whole(recipe: Path) -> Path:
    """An undisturbed run."""
    said = run_here(recipe, recipe.parent / "whole" / "run")
    assert f"the head for {recipe.parent / 'base' / 'model'} is" in said and "accepted" in said
    return recipe.parent / "whole" / "run"


def test_it_learns_to_guess(recipe: Path, whole: Path) -> None:
    rows = read_rows(whole / "log.jsonl")
    steps = [row for row in rows if "accept_1" in row]
    assert len(steps) == 24 and all({"hidden", "kl", "accept_2"} <= row.keys() for row in steps)
    first, last = steps[:4], steps[-4:]
    assert sum(row["loss"] for row in last) < 0.7 * sum(row["loss"] for row in first)
    for name in ("accept_1", "accept_2"):
        assert sum(row[name] for row in last) / 4 > sum(row[name] for row in first) / 4 + 0.1
    told = [row for row in rows if "eval" in row]
    assert [row["step"] for row in told] == [8, 16, 24]
    assert told[-1]["valid_loss"] < told[0]["valid_loss"]
    assert told[-1]["eval"]["accept_1"] > told[0]["eval"]["accept_1"]


def test_a_head_is_a_small_checkpoint_that_names_its_model(recipe: Path, whole: Path) -> None:
    base = recipe.parent / "base" / "model"
    config, tensors = read_config(whole / "model"), load_file(whole / "model" / "model.safetensors")
    assert config["architectures"] == ["EagleDraftHead"] and config["hidden_size"] == 32
    assert config["target"] == {"architecture": "LlamaForCausalLM", "digest": digest(base)}
    assert tensors["fc.weight"].shape == (32, 64)
    assert not [name for name in tensors if "embed" in name or "head" in name]
    assert all(name == "fc.weight" or name.startswith("layers.0.") for name in tensors)


def test_its_card_and_its_plan_speak_of_a_head(recipe: Path, whole: Path, tmp_path: Path) -> None:
    card = (whole / "model" / "README.md").read_text()
    assert "A draft head (1 layers, 32 wide" in card and '"method": "eagle", "model": "DIRECTORY"' in card
    machine = Machine(available=1 << 34, node=2)
    plans = []
    for changes in ({}, {"draft_head.depth": 1}):
        found = load_config(Recipe, recipe, {**HEAD, "run.output": str(tmp_path), **changes})
        plans.append(plan(found, spec_of(found), 2, machine))
    model = sum(parameter.numel() for parameter in load(recipe.parent / "base" / "model").parameters())
    head = sum(tensor.numel() for tensor in load_file(whole / "model" / "model.safetensors").values())
    assert plans[0].memory.peak.weights == 4 * (model + head // 2), "ZeRO divides the head alone"
    assert plans[0].memory.peak.total > plans[1].memory.peak.total and plans[0].fits


def test_killed_and_resumed_it_ends_with_the_same_bits(recipe: Path, whole: Path, tmp_path: Path) -> None:
    killed = tmp_path / "killed" / "run"
    kill_after(recipe, killed, 13, *(f"{k}={v}" for k, v in HEAD.items()))
    assert "going on from step-00000010" in run_here(recipe, killed)
    expected, found = bits(whole), bits(killed)
    assert expected.keys() == found.keys()
    assert [name for name in expected if expected[name] != found[name]] == []


@pytest.mark.parametrize("zero", [0, "auto"])
def test_two_ranks_train_what_one_does(recipe: Path, whole: Path, tmp_path: Path, zero: int | str) -> None:
    changes = {**HEAD, "run.output": str(tmp_path / "run"), "parallel.zero": zero}
    run = Run(recipe, 2, changes)
    assert run.end() == [0, 0], run.said(0) + run.said(1)
    assert read_losses(tmp_path / "run") == pytest.approx(read_losses(whole), rel=2e-3)


def test_another_model_is_refused_by_a_run_and_told_of_by_an_engine(
    recipe: Path, whole: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base, run = tmp_path / "base", tmp_path / "run"
    shutil.copytree(recipe.parent / "base" / "model", base)
    few = {"model__from": str(base), "schedule__steps": 3, "run__save_every": 1}
    run_here(recipe, run, **few)
    shutil.rmtree(run / "model")
    raw = bytearray((base / "model.safetensors").read_bytes())
    raw[-1000] ^= 1
    (base / "model.safetensors").write_bytes(raw)
    with pytest.raises(ConfigError, match=r"is not the model that the draft head's weights of .* were trained on"):
        run_here(recipe, run, **few)
    with caplog.at_level(logging.WARNING, logger="twofold.engine"):
        LLM(base, num_blocks=40, speculative={"method": "eagle", "model": str(whole / "model")})
    assert "was trained beside another model" in caplog.text


def test_what_cannot_be_is_refused(recipe: Path, whole: Path) -> None:
    fresh = recipe.with_name("pretrain.toml")
    for path, changes, message in (
        (fresh, {"sample.prompts": []}, r"\[draft_head\] needs model\.from"),
        (recipe, {"lora.rank": 2}, r"\[lora\] adapts the model itself"),
        (recipe, {"sample.prompts": ["The"]}, r"sample\.prompts are for the model itself"),
        (recipe, {"parallel.tp": 2}, r"set parallel\.tp = 1"),
        (recipe, {"draft_head.depth": 9}, "must be 8 at most, not 9"),
        (recipe, {"draft_head.hidden_weight": 0.0, "draft_head.token_weight": 0.0}, "nothing to learn"),
    ):
        with pytest.raises(ConfigError, match=message):
            launch.run(path, {**HEAD, "run.output": str(recipe.parent / "no"), **changes})
    base = recipe.parent / "base" / "model"
    for settings, message in (
        ({"method": "eagle"}, "method eagle and speculative.model go together"),
        ({"method": "eagle", "model": str(base)}, "is a model, not a draft head"),
        ({"method": "eagle", "model": str(whole / "model"), "quantization": "int8"}, "a draft head is small"),
    ):
        with pytest.raises(ConfigError, match=message):
            LLM(base, num_blocks=40, speculative=settings)
    with pytest.raises(ConfigError, match="only guesses for the model"):
        LLM(whole / "model", num_blocks=40)


def test_served_it_writes_what_none_writes_in_fewer_steps(recipe: Path, whole: Path) -> None:
    prompts, found, steps = [sentence[:20] for sentence in SENTENCES[::11]], [], []
    params = [
        SamplingParams(temperature=0.7 * (n % 2), seed=n, max_tokens=40, ignore_eos=True) for n in range(len(prompts))
    ]
    settings = {"method": "eagle", "model": str(whole / "model"), "num_speculative_tokens": 3}
    for wanted in ({}, settings, {**settings, "adaptive": False}):
        llm = LLM(recipe.parent / "base" / "model", num_blocks=200, max_num_seqs=4, speculative=wanted)
        done = llm.generate(prompts, params, progress=False)
        found.append([sample.token_ids for completion in done for sample in completion.outputs])
        steps.append(llm.engine.stats().steps)
    assert found[0] == found[1] == found[2]
    stats = llm.engine.stats()
    assert steps[2] < 0.85 * steps[0] and stats.accepted_per_pos[0] > 0.2 * stats.drafts


def test_the_shipped_recipe_takes_two_steps(tmp_path: Path) -> None:
    less = {
        "data.train": ["recipes/pybot/demonstrations.train.jsonl"],
        "data.tokens_per_step": 512,
        "run.threads": 1,
        "run.eval_every": 2,
        "run.log_every": 1,
        "schedule.warmup": 1,
        "schedule.steps": 2,
        "run.output": str(tmp_path),
    }
    assert launch.run("recipes/pybot/draft.toml", less) == 0
    rows = read_rows(tmp_path / "log.jsonl")
    assert any("accept_1" in row.get("eval", {}) for row in rows)
    assert (tmp_path / "model" / "model.safetensors").is_file()
