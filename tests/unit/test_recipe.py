"""What a recipe may say."""

from pathlib import Path

import pytest

from twofold.core import ConfigError, build, load_config
from twofold.train.config import Recipe


def plain(**changes) -> dict:
    table = {
        "kind": "pretrain",
        "model": {"from": "some/dir"},
        "data": {"train": ["notes.txt"]},
        "schedule": {"steps": 10},
        "run": {"output": "out"},
    }
    return table | changes


def test_from_is_read_though_python_keeps_the_word() -> None:
    recipe = build(Recipe, plain())
    assert recipe.model.from_ == Path("some/dir") and recipe.model.tokenizer_dir == Path("some/dir")
    assert recipe.identity()["model.from"] == "some/dir"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimiser": {}}, "unknown key 'optimiser': did you mean 'optimizer'"),
        ({"optimizer": {"rl": 1}}, "unknown key 'optimizer.rl': did you mean 'lr'|'optimizer.lr'"),
        ({"model": {"form": "x"}}, "unknown key 'model.form': did you mean 'model.from'"),
        ({"kind": "finetune"}, "'kind': unknown value 'finetune'"),
        ({"model": {}}, "either `config` .* or `from`"),
        ({"model": {"config": {}}}, "needs `tokenizer`"),
        ({"data": {"train": []}}, "data.train is empty"),
        ({"data": {"train": ["a"], "seq_len": 64, "tokens_per_step": 32}}, "less than one sequence of 64"),
        ({"data": {"train": ["a"], "micro_tokens": 32}}, "data.micro_tokens is 32, less than one sequence of 512"),
        ({"optimizer": {"betas": [0.9]}}, "two numbers"),
        ({"optimizer": {"name": "adamax"}}, "'optimizer.name': unknown value 'adamax'"),
        ({"fp16": {"hysteresis": 1}}, r"\[fp16\] is about scaling the loss, and model.dtype is fp32"),
        ({"run": {"output": "o", "save_every": 0}}, "run.save_every must be more than 0, not 0"),
        ({"sample": {"temperature": 9}}, "sample.temperature"),
    ],
)
def test_what_cannot_be_is_refused_by_name(changes: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(Recipe, plain(**changes))


def test_overrides_win_over_the_file(tmp_path: Path) -> None:
    path = tmp_path / "r.toml"
    path.write_text(
        'kind = "chat"\n[model]\nfrom = "m"\n[data]\ntrain = ["x.jsonl"]\n[schedule]\nsteps = 5\n[run]\noutput = "o"\n'
    )
    recipe = load_config(Recipe, path, {"schedule.steps": "7", "model.dtype": "bf16", "optimizer.lr": 0.5})
    assert (recipe.schedule.steps, recipe.model.dtype, recipe.optimizer.lr) == (7, "bf16", 0.5)


def test_identity_leaves_out_what_changes_no_weight() -> None:
    base = build(Recipe, plain()).identity()
    same = plain(run={"output": "elsewhere", "save_every": 3, "eval_every": 7}, sample={"prompts": ["a"]})
    assert build(Recipe, same).identity() == base
    for other in (plain(run={"output": "out", "seed": 1}), plain(run={"output": "out", "threads": 2})):
        assert build(Recipe, other).identity() != base


def test_a_run_that_knew_fewer_keys_goes_on_while_they_are_at_their_defaults() -> None:
    recipe = build(Recipe, plain())
    old = {key: value for key, value in recipe.identity().items() if not key.startswith(("fp16.", "schedule.k"))}
    del old["optimizer.name"], old["optimizer.trust"]
    assert recipe.changes(old) == {}
    assert build(Recipe, plain(optimizer={"betas": [0.9, 0.95], "name": "adamw"})).changes(old) == {}
    other = build(Recipe, plain(optimizer={"name": "lion"}, model={"from": "some/dir", "dtype": "fp16"}))
    assert other.changes(old) == {
        "model.dtype": ("fp32", "fp16"),
        "optimizer.betas": ([0.9, 0.95], [0.9, 0.99]),
        "optimizer.eps": (1e-8, None),
        "optimizer.name": ("adamw", "lion"),
    }
    assert recipe.changes(old | {"optimizer.gone": 3}) == {"optimizer.gone": (3, None)}
