"""Plans: what "auto" chooses, what would make a run fit, and that a change which is named does."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from twofold.commands.train_plan import planned
from twofold.core import ConfigError, load_config
from twofold.models.decoder import Decoder
from twofold.models.lora import adapt, pair_parameters
from twofold.models.lora_config import LoraConfig
from twofold.models.spec import ModelSpec
from twofold.models.weights import spec_from
from twofold.train.config import Recipe
from twofold.train.planning import RUNTIME, Machine, held, laid_out, load_of, plan, spec_of

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "recipes" / "pybot" / "pretrain.toml"


def recipe(**changes: Any) -> tuple[Recipe, ModelSpec]:
    given = {
        "model.config.hidden_size": 768,
        "model.config.intermediate_size": 2304,
        "model.config.num_hidden_layers": 12,
    }
    found = load_config(Recipe, RECIPE, given | {key.replace("__", "."): value for key, value in changes.items()})
    return found, spec_of(found)


def machine(room: int, node: int) -> Machine:
    return Machine(available=node * (room + RUNTIME), node=node)


def peak(given: Recipe, spec: ModelSpec, ranks: int, zero: Any) -> int:
    given = replace(given, parallel=replace(given.parallel, zero=zero))
    layout = laid_out(given, spec, ranks, machine(0, ranks))
    return held(given, spec, layout, load_of(given, spec, layout)).peak.total


def test_auto_takes_the_least_traffic_that_fits() -> None:
    given, spec = recipe()
    two, three = (peak(given, spec, 4, stage) for stage in (2, 3))
    assert three < two
    for room, stage, word in ((two, 2, "it fits"), (two - 1, 3, "3 fits"), (three - 1, 3, "does not fit either")):
        layout = laid_out(given, spec, 4, machine(room, 4))
        assert layout.stage == stage and len(layout.why) == 1 and word in layout.why[0]
    assert laid_out(given, spec, 1, machine(0, 1)).stage == 0


def test_a_stage_that_the_recipe_names_is_kept() -> None:
    given, spec = recipe(parallel__zero=1)
    assert laid_out(given, spec, 4, machine(0, 4)).stage == 1


@pytest.mark.parametrize("zero", [0, 2])
def test_what_is_named_makes_it_fit_and_less_would_not(zero: int) -> None:
    given, spec = recipe(parallel__zero=zero)
    needs = peak(given, spec, 2, zero)
    found = plan(given, spec, 2, machine(needs, 2))
    assert found.fits and not found.fixes
    short = machine(needs * 9 // 10, 2)
    found = plan(given, spec, 2, short)
    assert not found.fits and found.fixes
    for fix in found.fixes:
        said = re.fullmatch(r"([a-z]+)\.(\w+) = (.+)", fix)
        if said:
            value: Any = said[3].strip('"') if '"' in said[3] else int(said[3])
            changed, _ = recipe(**({"parallel__zero": zero} | {f"{said[1]}__{said[2]}": value}))
            assert plan(changed, spec, 2, short).fits, fix


def test_nothing_helps_where_a_layer_is_too_large() -> None:
    given, spec = recipe()
    found = plan(given, spec, 2, machine(1 << 20, 2))
    assert not found.fits and "take more machines" in found.fixes[0]


def test_a_pipeline_divides_layers_and_work_divides_among_ranks() -> None:
    given, spec = recipe(data__micro_tokens=1024)
    alone = plan(given, spec, 1, machine(1 << 40, 1))
    piped, _ = recipe(data__micro_tokens=1024, parallel__pp=2)
    half = plan(piped, spec, 2, machine(1 << 40, 2))
    assert alone.memory.built // 2 < half.memory.built < alone.memory.built * 6 // 10
    assert alone.flops == pytest.approx(2 * half.flops, rel=1e-6) and half.sent["pp"] > 0


def test_the_command_says_all_and_whether_it_fits(capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.setattr("twofold.commands.train_plan.matmul_peak", lambda device, dtype: 1e11)
    assert planned(str(RECIPE), ["parallel.zero=3"], True, "4", "2") == 0
    said = capsys.readouterr().out
    for word in ("ZeRO 3", "optimizer", "gathered", "sent on zero", "steps", "fits          yes"):
        assert word in said
    assert planned(str(RECIPE), ["model.config.hidden_size=65536"], True, "2", None) == 1
    assert "would fit" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="--plan"):
        planned(str(RECIPE), [], False, "2", None)
    with pytest.raises(ConfigError, match="whole number of machines"):
        planned(str(RECIPE), [], True, "4", "3")


def test_adapters_take_what_they_are_of_the_model_in_states_gradients_and_traffic() -> None:
    full, spec = recipe(parallel__zero=3)
    lean = replace(full, lora=LoraConfig(rank=2))
    every, mine = (plan(it, spec, 2, machine(1 << 40, 2)) for it in (full, lean))
    share = mine.load.trained
    decoder = Decoder(spec, device="meta")
    whole = sum(parameter.numel() for parameter in decoder.parameters())
    adapt(decoder, LoraConfig(rank=2))
    assert share == pytest.approx(sum(p.numel() for p in pair_parameters(decoder).values()) / whole) and share < 0.1
    assert mine.memory.peak.optimizer < every.memory.peak.optimizer * share * 1.01
    assert every.memory.built < mine.memory.built < every.memory.built * (1 + 2 * share)
    assert mine.memory.kept < every.memory.kept / 2
    assert mine.sent["zero"] < every.sent["zero"] * 0.75 and mine.flops == pytest.approx(every.flops * 2 / 3, rel=1e-6)


def test_a_spec_comes_from_the_recipe() -> None:
    given, spec = recipe()
    assert given.model.config is not None and spec == spec_from(given.model.config)
