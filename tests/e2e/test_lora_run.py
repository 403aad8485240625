"""`twofold train` with a [lora] table: adapters on one rank or two, killed or not, and what is there at the end."""

from __future__ import annotations

import io
import shutil
import signal
from pathlib import Path

import pytest
import torch
from ranks import Run, read_losses
from rich.console import Console
from safetensors.torch import load_file
from tiny_recipe import bits, kill_after, write_recipe

from twofold.commands.checkpoint import checkpoint
from twofold.core import CheckpointError, ConfigError
from twofold.engine.config import EngineConfig
from twofold.engine.engine import Engine
from twofold.engine.request import Request
from twofold.engine.sampling import SamplingParams
from twofold.models import load, load_adapter, read_config, save
from twofold.models.lora import merge
from twofold.models.quantized import formats, quantize_weights
from twofold.train import launch
from twofold.train.trainer import STOPPED

LORA = {"lora.rank": 4, "lora.alpha": 16, "run.save_every": 5}
SHORT = LORA | {"schedule.steps": 8, "run.save_every": 3, "sample.prompts": []}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    """A recipe that starts from a model that was trained a little."""
    folder = tmp_path_factory.mktemp("recipe")
    fresh = write_recipe(folder)
    assert launch.run(fresh, {"schedule.steps": 12, "run.output": str(folder / "base")}) == 0
    text, model = fresh.read_text(), f'[model]\nfrom = "{folder / "base" / "model"}"'
    begin, end = text.index("[model.config]"), text.index("[data]")
    path = folder / "lora.toml"
    path.write_text(text[:begin].replace("[model]", model) + text[end:])
    return path


def run_here(recipe: Path, output: Path, **changes) -> str:
    said = io.StringIO()
    changed = {key.replace("__", "."): value for key, value in changes.items()}
    overrides = {**LORA, "run.output": str(output), **changed}
    assert launch.run(recipe, overrides, console=Console(file=said, width=200)) == 0
    return said.getvalue()


@pytest.fixture(scope="module")
def whole(recipe: Path) -> Path:
    """An undisturbed run."""
    said = run_here(recipe, recipe.parent / "whole" / "run")
    assert "M in adapters), 24 steps" in said
    return recipe.parent / "whole" / "run"


def test_adapters_learn_and_the_model_is_the_base_with_them_merged(recipe: Path, whole: Path) -> None:
    losses = read_losses(whole)
    assert sum(losses[-6:]) < sum(losses[:6]) - 0.3
    base = recipe.parent / "base" / "model"
    decoder = load(base)
    load_adapter(decoder, whole / "adapter")
    merge(decoder)
    for (name, ours), merged in zip(decoder.named_parameters(), load(whole / "model").parameters(), strict=True):
        assert torch.equal(ours, merged), name
    before = dict(load(base).named_parameters())
    moved = {name for name, parameter in decoder.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved == {f"layers.{i}.{part}.weight" for i in (0, 1) for part in ("qkv", "out", "gate_up", "down")}


def test_a_runs_adapter_is_served_as_it_is(recipe: Path, whole: Path) -> None:
    """What training wrote, beside the base in an engine, has the bits that it has in training."""
    base, ids = recipe.parent / "base" / "model", tuple(range(5, 25))

    def scores(trained: bool) -> list[float | None]:
        decoder = load(base)
        if trained:
            load_adapter(decoder, whole / "adapter")
        engine = Engine(decoder, EngineConfig(num_blocks=8, enable_lora=not trained))
        if not trained:
            engine.adapters.load("run", str(whole / "adapter"))
        params = SamplingParams(max_tokens=1, prompt_logprobs=0, temperature=0.0)
        engine.submit(Request(id="r", prompt_ids=ids, params=params, adapter="" if trained else "run"))
        (output,) = engine.step()
        assert output.prompt is not None
        return [token.logprob for token in output.prompt]

    assert scores(trained=True) == scores(trained=False)


def test_a_checkpoint_is_a_directory_of_adapters_alone(recipe: Path, whole: Path) -> None:
    newest = whole / "checkpoints" / "step-00000024"
    assert not list(newest.glob("model*")) and not (newest / "config.json").exists()
    loaded, last = load(recipe.parent / "base" / "model"), load_file(whole / "adapter" / "adapter_model.safetensors")
    assert load_adapter(loaded, newest).rank == 4
    for name, tensor in load_file(newest / "adapter_model.safetensors").items():
        assert torch.equal(tensor, last[name])
    assert (whole / "adapter" / "tokenizer.json").exists()


def test_an_export_of_a_checkpoint_is_the_merged_model(recipe: Path, whole: Path, tmp_path: Path) -> None:
    assert checkpoint("export", whole, str(tmp_path / "model"), None) == 0
    ours, merged = (load_file(path / "model.safetensors") for path in (tmp_path / "model", whole / "model"))
    assert ours.keys() == merged.keys() and all(torch.equal(ours[name], merged[name]) for name in ours)
    assert (tmp_path / "model" / "tokenizer.json").exists()
    run_here(recipe.with_name("pretrain.toml"), tmp_path / "seed", schedule__steps=3)
    with pytest.raises(CheckpointError, match="their base was drawn from a seed"):
        checkpoint("export", tmp_path / "seed", str(tmp_path / "other"), None)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_killed_and_resumed_it_ends_with_the_same_bits(recipe: Path, whole: Path, tmp_path: Path, dtype: str) -> None:
    if dtype == "bf16":
        whole = tmp_path / "whole" / "run"
        run_here(recipe, whole, model__dtype=dtype)
    killed = tmp_path / "killed" / "run"
    kill_after(recipe, killed, 13, *(f"{k}={v}" for k, v in LORA.items()), f"model.dtype={dtype}")
    assert "going on from step-00000010" in run_here(recipe, killed, model__dtype=dtype)
    expected, found = bits(whole), bits(killed)
    assert expected.keys() == found.keys()
    assert [name for name in expected if expected[name] != found[name]] == []
    same = (whole / "adapter" / "adapter_model.safetensors").read_bytes()
    assert (killed / "adapter" / "adapter_model.safetensors").read_bytes() == same


@pytest.mark.parametrize(
    "changes",
    [
        {"offload__parameters": "disk", "offload__optimizer": "disk", "offload__gradients": "host"},
        {"model__recompute": "full", "model__activations": "host"},
    ],
    ids=["offload", "recompute"],
)
def test_where_numbers_wait_changes_no_bit(recipe: Path, whole: Path, tmp_path: Path, changes: dict) -> None:
    run_here(recipe, tmp_path / "run", **changes)
    assert read_losses(tmp_path / "run") == read_losses(whole)
    one, other = (path / "model" / "model.safetensors" for path in (whole, tmp_path / "run"))
    assert one.read_bytes() == other.read_bytes()


def test_other_rules_rewinds_and_fresh_bases(recipe: Path, tmp_path: Path) -> None:
    fresh = recipe.with_name("pretrain.toml")
    run_here(fresh, tmp_path / "muon", optimizer__name="muon", optimizer__lr=0.02, schedule__steps=6)
    first, *_, last = read_losses(tmp_path / "muon")
    assert last != first and (tmp_path / "muon" / "adapter").is_dir()
    chat = write_recipe(recipe.parent, "chat")
    said = run_here(chat, tmp_path / "chat", schedule__steps=4, elastic__on_spike="rewind")
    assert "finished 4 steps" in said and (tmp_path / "chat" / "model" / "model.safetensors").exists()


def test_another_base_is_refused(recipe: Path, tmp_path: Path) -> None:
    base, run = tmp_path / "base", tmp_path / "run"
    shutil.copytree(recipe.parent / "base" / "model", base)
    run_here(recipe, run, model__from=str(base), schedule__steps=4, run__save_every=2)
    shutil.rmtree(run / "model")
    weights = base / "model.safetensors"
    raw = bytearray(weights.read_bytes())
    raw[-1000] ^= 1
    weights.write_bytes(raw)
    with pytest.raises(ConfigError, match=r"is not the model that the adapters of .* were trained on"):
        run_here(recipe, run, model__from=str(base), schedule__steps=4, run__save_every=2)
    with pytest.raises(ConfigError, match=r"lora\.rank was 4, is 8"):
        run_here(recipe, run, model__from=str(base), schedule__steps=4, run__save_every=2, lora__rank=8)


def test_a_quantized_base_stays_as_it_is(recipe: Path, tmp_path: Path) -> None:
    floats, base = recipe.parent / "base" / "model", tmp_path / "int8"
    shutil.copytree(floats, base)
    decoder = load(floats)
    quantize_weights(decoder, formats(decoder, "int8"))
    save(decoder, base, config=read_config(floats))
    said = run_here(recipe, tmp_path / "run", model__from=str(base), schedule__steps=12)
    assert f"the model is {base} (quantized, as it was) with the adapter {tmp_path / 'run' / 'adapter'}" in said
    assert not (tmp_path / "run" / "model").exists()
    losses = read_losses(tmp_path / "run")
    assert sum(losses[-4:]) < sum(losses[:4]) - 0.1
    assert load_adapter(load(base), tmp_path / "run" / "adapter").rank == 4
    stored = load_file(tmp_path / "run" / "checkpoints" / "step-00000012" / "state-00001-of-00001.safetensors")
    assert not [name for name in stored if "codes" in name], "of the base nothing is kept"
    assert "finished, all 12 steps are done" in run_here(
        recipe, tmp_path / "run", model__from=str(base), schedule__steps=12
    )


# --------------------------------------------------------------------------------------------- two ranks
@pytest.fixture(scope="module")
def short(recipe: Path) -> Path:
    """The short run of one process."""
    run_here(recipe, recipe.parent / "short", **{key.replace(".", "__"): value for key, value in SHORT.items()})
    return recipe.parent / "short"


def begin(recipe: Path, output: Path, **changes) -> Run:
    changed = {key.replace("__", "."): value for key, value in changes.items()}
    return Run(recipe, 2, {**SHORT, "run.output": str(output), **changed})


def close(expected: Path, run: Path) -> None:
    assert read_losses(run) == pytest.approx(read_losses(expected), rel=1e-6, abs=1e-6)
    for place in ("model/model.safetensors", "adapter/adapter_model.safetensors"):
        one, other = load_file(expected / place), load_file(run / place)
        assert one.keys() == other.keys()
        for name, tensor in one.items():
            torch.testing.assert_close(other[name], tensor, atol=2e-5, rtol=0, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize(
    "layout",
    [
        {"parallel__zero": 0},
        {"parallel__zero": 1},
        {"parallel__zero": 2, "sample__prompts": ["The fox"]},
        {"parallel__zero": 3, "sample__prompts": ["The fox"]},
        {"parallel__sp": 2},
    ],
    ids=["zero0", "zero1", "zero2", "zero3", "ulysses"],
)
def test_two_ranks_train_what_one_process_does(recipe: Path, short: Path, tmp_path: Path, layout: dict) -> None:
    run = begin(recipe, tmp_path / "run", **layout)
    assert run.end() == [0, 0], run.said() + run.said(1)
    close(short, run.output)


def test_stopped_on_two_ranks_and_ended_on_one(recipe: Path, short: Path, tmp_path: Path) -> None:
    run = begin(recipe, tmp_path / "run", parallel__zero=3)
    run.until(4)
    run.kill(how=signal.SIGTERM)
    assert run.end() == [STOPPED] * 2, run.said()
    run_here(recipe, run.output, **{key.replace(".", "__"): value for key, value in SHORT.items()})
    close(short, run.output)


def test_bf16_is_divided_with_fp32_shards(recipe: Path, tmp_path: Path) -> None:
    run = begin(recipe, tmp_path / "run", parallel__zero=3, model__dtype="bf16")
    assert run.end() == [0, 0], run.said() + run.said(1)
    stored = load_file(run.output / "checkpoints" / "step-00000008" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    states = load_file(run.output / "checkpoints" / "step-00000008" / "state-00001-of-00002.safetensors")
    masters = [name for name in states if name.startswith("master.")]
    assert masters and all(".lora." in name for name in masters), "of the base nothing is kept"


@pytest.mark.parametrize("axis", ["tp", "pp"])
def test_axes_that_do_not_divide_adapters_are_refused(recipe: Path, tmp_path: Path, axis: str) -> None:
    run = begin(recipe, tmp_path / "run", **{f"parallel__{axis}": 2})
    assert 2 in run.end()
    assert rf"[lora] and parallel.{axis} = 2" in run.said() + run.said(1)
