"""A ds_config: every key has an answer, wrong ones are told, the batch-size triangle closes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from deepspeed_schema import PATHS

from twofold.core import ConfigError
from twofold.train.deepspeed.config import resolve
from twofold.train.deepspeed.keys import TABLE, default, rows
from twofold.train.deepspeed.schedules import WarmupLR

BATCH = {"train_batch_size": 8}


def nested(path: str, value: Any) -> dict[str, Any]:
    """A ds_config that says one thing, its block switched on where it has a switch."""
    *blocks, key = path.split(".")
    table: dict[str, Any] = {}
    place = table
    for block in blocks:
        place = place.setdefault(block, {})
    if f"{'.'.join(blocks)}.enabled" in rows():
        place["enabled"] = True
    place[key] = value
    return table


def told(config: dict[str, Any], world: int = 1, **machine: Any) -> str:
    with pytest.raises(ConfigError) as error:
        resolve(config, world, **machine)
    return str(error.value)


# --------------------------------------------------------------------------------------------- the table
@pytest.mark.parametrize("path", PATHS)
def test_every_key_of_the_schema_has_an_answer(path: str) -> None:
    row, _ = rows()[path]
    assert len(row.words) > 5


def test_no_key_is_answered_twice() -> None:
    assert sum(len(row.keys) for row in TABLE) == len(rows())


def other_than(wanted: Any) -> Any:
    """A value that is not the default."""
    if isinstance(wanted, tuple):
        return wanted[1]
    kind = wanted if isinstance(wanted, type) else type(wanted)
    if kind is bool:
        return not default(wanted)
    return {int: 7, float: 0.25, str: "x", list: ["x"], dict: {"x": 1}}.get(kind, "x")


@pytest.mark.parametrize("path", [path for path, (row, _) in rows().items() if row.answer == "refused"])
def test_a_refused_key_says_what_to_use_instead(path: str) -> None:
    row, wanted = rows()[path]
    if path.endswith(".enabled"):
        assert row.words in told(BATCH | nested(path, True))
        return
    message = told(BATCH | nested(path, other_than(wanted)))
    assert row.words in message and row.where in message


@pytest.mark.parametrize("path", [path for path, (row, _) in rows().items() if row.answer == "nothing"])
def test_a_key_that_changes_nothing_may_be_given(path: str) -> None:
    wanted = rows()[path][1]
    said = BATCH | nested(path, other_than(wanted))
    if path.startswith("optimizer."):
        said["optimizer"]["type"] = "AdamW"  # without one there is nothing to have parameters
    unsaid = json.loads(json.dumps(said))
    place = unsaid
    for block in path.split(".")[:-1]:
        place = place[block]
    del place[path.rpartition(".")[2]]
    assert resolve(said, 1) == resolve(unsaid, 1)


def test_a_block_that_is_switched_off_says_nothing() -> None:
    off = {"enabled": False, "max_train_batch_size": 7, "micro_batch_sizes": [2]}
    assert resolve(BATCH | {"elasticity": off}, 1) == resolve(BATCH, 1)
    assert "elasticity" in told(BATCH | {"elasticity": off | {"enabled": True}})


def test_the_page_has_the_table() -> None:
    page = (Path(__file__).parents[2] / "docs" / "deepspeed.md").read_text(encoding="utf-8")
    for row in TABLE:
        keys = ", ".join(f"`{key}`" for key in row.keys)
        assert f"| {keys} | {row.answer} | {row.words.replace('|', '/')} |" in page


# --------------------------------------------------------------------------------------------- keys that are wrong
@pytest.mark.parametrize(
    ("config", "hint"),
    [
        ({"gradient_clipp1ng": 1.0}, "'gradient_clipping'"),
        ({"zero_optimisation": {"stage": 3}}, "'zero_optimization'"),
        ({"zero_optimization": {"stag": 3}}, "'zero_optimization.stage'"),
        ({"zero_optimization": {"offload_param": {"devise": "cpu"}}}, "'zero_optimization.offload_param.device'"),
        ({"optimizer": {"type": "Adam", "params": {"weigth_decay": 0.1}}}, "'optimizer.params.weight_decay'"),
        ({"stage": 3}, "'zero_optimization.stage'"),
        ({"bf16": {"enable": True}}, "'bf16.enabled'"),
        ({"xyz": 1}, "choose from"),
    ],
)
def test_an_unknown_key_is_told_with_the_nearest_name(config: dict[str, Any], hint: str) -> None:
    message = told(BATCH | config)
    assert "unknown key" in message and hint in message


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"train_batch_size": "many"}, "a whole number"),
        ({"train_batch_size": 2.5}, "a whole number"),
        ({"gradient_clipping": "x"}, "a number"),
        ({"gradient_clipping": -1}, "0 or more"),
        ({"wall_clock_breakdown": 1}, "true or false"),
        ({"zero_optimization": 3}, "must be a table"),
        ({"zero_optimization": {"stage": 4}}, "0, 1, 2 or 3"),
        ({"zero_optimization": {"stage": 2, "mics_shard_size": 2}}, "stage 3"),
        ({"zero_optimization": {"zero_quantized_weights": True}}, "go together"),
        ({"zero_optimization": {"zero_quantized_weights": True, "zero_quantized_gradients": True}}, "stage 0 is none"),
        ({"gradient_allreduce_op": "max"}, "one of mean, sum"),
        ({"bf16": {"enabled": True}, "fp16": {"enabled": True}}, "both true"),
        ({"bf16": {"enabled": True}, "torch_autocast": {"enabled": True}}, "keep one"),
        ({"fp16": {"enabled": True, "hysteresis": 0}}, "more than 0"),
        ({"optimizer": {"type": "OneBitAdam"}}, "initialize(optimizer=...)"),
        ({"optimizer": {"params": {"lr": 1.0}}}, "without an optimizer.type"),
        ({"optimizer": {"type": "SGD", "params": {"betas": [0.9, 0.99]}}}, "means nothing to SGD"),
        ({"optimizer": {"type": "Adam", "params": {"betas": [0.9]}}}, "two numbers"),
        ({"optimizer": {"type": "Adam", "params": {"max_grad_norm": 1.0}}}, "gradient_clipping"),
        ({"scheduler": {"params": {"warmup_num_steps": 1}}}, "without a scheduler.type"),
        ({"scheduler": {"type": "WarmupLr"}}, "WarmupLR"),
        ({"scheduler": {"type": "WarmupDecayLR"}}, "total_num_steps"),
        ({"scheduler": {"type": "WarmupLR", "params": {"total_num_steps": 9}}}, "total_num_steps"),
        ({"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 0}}}, "1 or more"),
    ],
)
def test_a_wrong_value_is_told(config: dict[str, Any], words: str) -> None:
    assert words in told(BATCH | config)


def test_files(tmp_path: Path) -> None:
    place = tmp_path / "ds.json"
    place.write_text(json.dumps(BATCH))
    assert resolve(place, 1) == resolve(str(place), 1) == resolve(BATCH, 1)
    place.write_text('{"train_batch_size": 8, "train_batch_size": 16}')
    with pytest.raises(ConfigError, match="twice"):
        resolve(place, 1)
    place.write_text("{,}")
    with pytest.raises(ConfigError, match="is not JSON"):
        resolve(place, 1)
    with pytest.raises(ConfigError, match="cannot be read"):
        resolve(tmp_path / "none.json", 1)


def test_what_is_offloaded() -> None:
    def said(what: str, **keys: Any) -> dict[str, Any]:
        return BATCH | {"zero_optimization": {"stage": 3, f"offload_{what}": keys}}

    host = said("optimizer", device="cpu", pin_memory=True)
    assert resolve(host, 1) == resolve(BATCH | {"zero_optimization": {"stage": 3}}, 1)
    assert resolve(host, 1, accelerator=True).offload.optimizer == "host"
    disk = resolve(said("optimizer", device="nvme", nvme_path="/disk", buffer_count=2), 1).offload
    assert (disk.optimizer, disk.directory, disk.buffers) == ("disk", Path("/disk"), 2)
    assert "nvme_path" in told(said("optimizer", device="nvme"))
    assert "offload_param.device" in told(said("param", device="cpu"), accelerator=True)
    assert "[offload]" in told(said("param", device="nvme", nvme_path="/disk"))


# --------------------------------------------------------------------------------------------- the triangle and auto
@pytest.mark.parametrize(
    ("train", "micro", "steps", "world", "wanted"),
    [
        (24, None, None, 2, (24, 12, 1)),
        (None, 3, None, 2, (6, 3, 1)),
        (24, 3, None, 2, (24, 3, 4)),
        (24, None, 4, 2, (24, 3, 4)),
        (None, 3, 4, 2, (24, 3, 4)),
        (24, 3, 4, 2, (24, 3, 4)),
        (24.0, "auto", 4, 2, (24, 3, 4)),
    ],
)
def test_any_two_give_the_third(train: Any, micro: Any, steps: Any, world: int, wanted: tuple[int, int, int]) -> None:
    names = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    config = {name: value for name, value in zip(names, (train, micro, steps)) if value is not None}
    found = resolve(config, world)
    assert (found.train_batch, found.micro_batch, found.accumulation) == wanted
    assert f"{wanted[0]} = {wanted[1]} a rank x {wanted[2]} micro-batches x {world} ranks" in found.notes[-1]


@pytest.mark.parametrize(
    ("config", "numbers"),
    [
        ({"train_batch_size": 32, "train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 3}, "= 24"),
        ({"train_batch_size": 10, "train_micro_batch_size_per_gpu": 4}, "the nearest that is: 8"),
        ({"train_batch_size": 9}, "the nearest that is: 8"),
        ({"gradient_accumulation_steps": 3}, "needs train_batch_size"),
        ({"train_batch_size": 0}, "1 or more"),
    ],
)
def test_contradictions_are_told_with_the_numbers(config: dict[str, Any], numbers: str) -> None:
    assert numbers in told(config, world=2)


def test_auto_is_resolved_and_told_or_refused() -> None:
    config = BATCH | {
        "bf16": {"enabled": "auto"},
        "fp16": {"enabled": "auto"},
        "gradient_clipping": "auto",
        "zero_optimization": {"stage": 2, "reduce_bucket_size": "auto"},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "betas": "auto", "weight_decay": "auto"}},
    }
    found = resolve(config, 1, dtype="bf16")
    assert (found.dtype, found.clip) == ("bf16", 1.0)
    assert found.optimizer is not None
    assert found.optimizer.numbers == {"lr": 1e-4, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}
    for words in ("bf16.enabled = True", "fp16.enabled = False", "gradient_clipping = 1.0", "weight_decay = 0.0"):
        assert any(words in note for note in found.notes), words
    for path in ("optimizer.params.lr", "scheduler.params.total_num_steps"):
        assert "only the script knows" in told(BATCH | nested(path, "auto"))


def test_a_narrow_module_in_an_fp32_run_is_refused() -> None:
    assert "enable bf16" in told(BATCH, dtype="bf16")


# --------------------------------------------------------------------------------------------- what keys come to
def test_what_is_mapped(tmp_path: Path) -> None:
    found = resolve(
        {
            "train_batch_size": 16,
            "gradient_accumulation_steps": 2,
            "gradient_clipping": 0,
            "steps_per_print": 5,
            "zero_optimization": {"stage": 3, "zero_hpz_partition_size": 2, "zero_quantized_weights": True,
                                  "zero_quantized_gradients": True},
            "fp16": {"enabled": True, "auto_cast": True, "initial_scale_power": 10, "hysteresis": 4},
            "optimizer": {"type": "Adam", "params": {"lr": 2e-3, "adam_w_mode": False, "torch_adam": True}},
            "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 10.0, "last_batch_iteration": 3}},
            "csv_monitor": {"enabled": True, "output_path": str(tmp_path), "job_name": "a"},
        },
        4,
    )  # fmt: skip
    assert (found.micro_batch, found.clip, found.print_every, found.stage) == (2, 0.0, 5, 3)
    assert (found.parallel.zero, found.parallel.node, found.parallel.comm) == ("hybrid", 2, "int8")
    assert found.fp16 is not None and (found.fp16.initial_scale_power, found.fp16.hysteresis) == (10, 4)
    assert found.cast_inputs and found.optimizer is not None and found.optimizer.name == "adam"
    assert found.schedule == WarmupLR(warmup_num_steps=10) and found.last_step == 3
    assert (found.csv, found.tensorboard) == (tmp_path / "a", None)


def test_muons_two_rates() -> None:
    def rates(**params: float) -> tuple[float, float]:
        found = resolve(BATCH | {"optimizer": {"type": "Muon", "params": params}}, 1).optimizer
        assert found is not None and "lr" not in found.numbers
        return found.numbers["muon_lr"], found.numbers["adam_lr"]

    assert rates() == (0.02, 3e-4)
    assert rates(lr=0.1) == (0.1, 0.1)
    assert rates(lr=0.1, adam_lr=1e-3) == (0.1, 1e-3)
