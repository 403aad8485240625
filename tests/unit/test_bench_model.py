"""The models that benchmarks run are what they say, and engines that peers are made from are pinned."""

from __future__ import annotations

import json
from pathlib import Path

import model as models
import pytest
from engines import FORMATS, OURS, PEER_ENTRIES, NotHere, Stand

from benchmarks.peers import build
from twofold.data import Tokenizer
from twofold.engine.config import EngineConfig
from twofold.models import load, read_spec, spec_from


def test_the_reference_model_has_the_shape_of_qwen3_0_6b() -> None:
    spec = spec_from(models.MODELS["reference"])
    assert models.body_weights(spec) == 28 * (1024 * (2048 + 2 * 1024) + 2048 * 1024 + 3 * 1024 * 3072)
    assert models.head_weights(spec) == 151_936 * 1024 and spec.head.tied


def test_a_model_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = models.MODELS["quick"] | {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
    small |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "vocab_size": 1024}
    monkeypatch.setitem(models.MODELS, "small", small)
    folder = models.make("small", tmp_path)
    written = (folder / "model.safetensors").stat().st_mtime_ns
    assert models.make("small", tmp_path) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == written
    assert read_spec(folder).vocab == 1024
    assert load(folder).layers[0].q_norm.weight.unique().tolist() == [2.0]  # louder than fresh weights
    monkeypatch.setitem(models.MODELS, "small", small | {"num_hidden_layers": 2})
    assert len(read_spec(models.make("small", tmp_path)).layers) == 2


def test_the_tokenizer_fills_the_vocabulary_and_loses_nothing(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps(models.tokenizer(2000)))
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.vocab_size == 2000
    assert len(set(models.byte_characters())) == 256
    assert len(tokenizer.encode_prompt("hello there")) < len("hello there")


def test_our_variants_are_settings_of_the_engine() -> None:
    for form in FORMATS:
        given = dict(flag.split("=") for flag in OURS.variants[form].flags[1:])
        assert EngineConfig(**given)  # type: ignore[arg-type]


def test_every_engine_has_its_environment_and_scripts() -> None:
    peers = Path(build.__file__).parent
    for entry in (OURS, *PEER_ENTRIES):
        assert (peers / entry.runner).is_file() and set(entry.variants) <= set(FORMATS)
        homes = {entry.home, entry.maker_home} - {""}
        assert homes <= set(build.RECIPES)
        if any(variant.made for variant in entry.variants.values()):
            assert (peers / entry.maker).is_file()


def test_what_is_not_there_is_told(tmp_path: Path) -> None:
    stand = Stand(model=tmp_path, place=tmp_path, threads=1, cache_gb=1, quick=True)
    transformers = next(entry for entry in PEER_ENTRIES if entry.name == "transformers")
    with pytest.raises(NotHere, match="it has no int8"):
        stand.start(transformers, "int8")
    with pytest.raises(NotHere, match="make peers"):
        stand.start(transformers, "fp32")


@pytest.mark.parametrize("name", build.RECIPES)
def test_recipes_are_pinned(name: str) -> None:
    recipe = build.RECIPES[name]
    first = recipe.bare or recipe.needs[0]
    assert "==" in first and not any(need.startswith("torch") for need in recipe.needs)
    assert build.key_of(recipe, "torch==2.13.0") != build.key_of(recipe, "torch==2.14.0")


def test_only_a_proved_environment_counts_as_built(tmp_path: Path) -> None:
    key = build.key_of(build.RECIPES["openvino"], "torch")
    python = build.python_of(tmp_path, "openvino")
    python.parent.mkdir(parents=True)
    python.touch()
    for record, expected in (({"key": key}, None), ({"key": key, "version": "1"}, "1"), ({"key": "x"}, None)):
        (tmp_path / "openvino.json").write_text(json.dumps(record))
        assert build.built(tmp_path, "openvino", "torch") == expected


def test_the_reason_is_the_line_that_names_an_error() -> None:
    assert build.reason("Collecting x\nERROR: No matching distribution\n\nnotice: a newer pip\n") == (
        "ERROR: No matching distribution"
    )
