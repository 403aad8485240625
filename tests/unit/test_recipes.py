"""The shipped recipes are read as they stand, and one that says how its vocabulary is made gets it made once."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from twofold.align.config import AlignRecipe
from twofold.core import ConfigError, build, load_config
from twofold.data.dataset import SOURCES
from twofold.train.build import build_words
from twofold.train.config import Recipe

RECIPES = sorted(path for path in Path("recipes").rglob("*.toml") if path.parent.name != "tasks")


@pytest.mark.parametrize("path", RECIPES, ids=str)
def test_shipped_recipes_are_read(path: Path) -> None:
    aligns = "algorithm" in tomllib.loads(path.read_text(encoding="utf-8"))
    recipe = load_config(AlignRecipe if aligns else Recipe, path)
    for source in recipe.data.train + recipe.data.valid:
        assert source in SOURCES or Path(source).exists(), source


def test_a_vocabulary_is_trained_once(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("def f(self):\n    return self\n" * 30)
    table = {
        "kind": "pretrain",
        "tokenizer": {"sources": [str(tmp_path / "text.txt")], "size": 270},
        "model": {"config": {}, "tokenizer": str(tmp_path / "vocabulary")},
        "data": {"train": [str(tmp_path / "text.txt")]},
        "schedule": {"steps": 1},
        "run": {"output": str(tmp_path / "run")},
    }
    first = build_words(build(Recipe, table))
    assert 259 < first.tokenizer.vocab_size <= 270
    stamp = (tmp_path / "vocabulary" / "tokenizer.json").stat().st_mtime_ns
    table["tokenizer"]["size"] = 300
    assert build_words(build(Recipe, table)).tokenizer.vocab_size == first.tokenizer.vocab_size
    assert (tmp_path / "vocabulary" / "tokenizer.json").stat().st_mtime_ns == stamp
    assert not list(tmp_path.glob("*.tmp-*"))
    with pytest.raises(ConfigError, match=r"tokenizer\.sice"):
        build(Recipe, {**table, "tokenizer": {"sources": ["x"], "sice": 300}})
