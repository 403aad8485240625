"""`twofold quantize` on the bundled model: what it costs, what it writes, and that everything else takes it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from twofold import LLM, SamplingParams, cli
from twofold.commands.model import bundled_model
from twofold.commands.quantize import perplexity, read, run
from twofold.core import ConfigError
from twofold.data.pack import Batch
from twofold.models import load, read_config, save
from twofold.models.quantized import formats_of
from twofold.quant import named
from twofold.quant.config import Reading, Recipe

TEXT = 'def greet(name):\n    """Say hello to somebody."""\n    print("hello", name)\n\n\n' * 40


@pytest.fixture(scope="module")
def texts() -> tuple[list[Batch], list[Batch]]:
    """A little of the standard library to calibrate on, and some of what the model never saw."""
    return read(bundled_model(), Reading(calibrate_tokens=2048, eval_tokens=2048, seq_len=256))


@pytest.mark.parametrize(
    ("recipe", "most"),
    [
        (Recipe(format="int8"), 0.005),
        (Recipe(format="int8", method="smoothquant"), 0.005),
        (Recipe(format="int4", method="gptq"), 0.03),
        (Recipe(format="int4", method="awq", weight_only=True), 0.03),
    ],
    ids=lambda value: f"{value.name}-{value.method}" if isinstance(value, Recipe) else "",
)
def test_what_it_costs(recipe: Recipe, most: float, texts: tuple[list[Batch], list[Batch]]) -> None:
    decoder = load(bundled_model(), dtype=torch.bfloat16)
    report = run(decoder, recipe, *texts)
    assert report.cost is not None and abs(report.cost) < most
    held = formats_of(decoder)
    assert held["layers.0.down"] == named(recipe.name) and held["embed"].bits == 8
    assert len(report.weights) == len(held) == 25 and all(0 < told.error < 0.2 for told in report.weights)


def test_perplexity_is_of_the_mean_of_logs() -> None:
    decoder = load(bundled_model())
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.zero_()
    ids = torch.arange(700)
    targets = torch.where(ids % 3 == 0, -100, ids)
    ticks: list[str] = []
    found = perplexity(decoder, [Batch(ids, targets, (300, 400))] * 2, ticks.append)
    assert found == pytest.approx(decoder.spec.vocab, rel=1e-4) and len(ticks) == 2


def test_the_command_writes_what_the_others_take(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "small"
    words = ["quantize", "--format", "int4", "--group", "64", "--asymmetric", "--method", "awq", "--output", str(out)]
    assert cli.run([*words, "--calibrate-tokens", "512", "--eval-tokens", "512", "--seq-len", "128"]) == 0
    said = capsys.readouterr().out
    for part in ("int4-g64-asym: groups of 64", "layers.5", "embed", "perplexity", "saved"):
        assert part in said
    assert {path.name for path in out.iterdir()} >= {
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
    }
    size, whole = ((folder / "model.safetensors").stat().st_size for folder in (out, bundled_model()))
    assert size < 0.36 * whole

    params = SamplingParams(temperature=0, max_tokens=12)
    answer = LLM(out).generate(["import os\n"], params)[0].outputs[0]
    assert len(answer.token_ids) == 12
    assert cli.run(["generate", "--model", str(out), "--prompt", "import os\n", "--max-tokens", "12"]) == 0
    assert capsys.readouterr().out.strip() == answer.text.strip()
    assert cli.run(["plan", str(out)]) == 0
    assert "as int4-g64-asym, int8" in capsys.readouterr().out

    save(load(out, dtype=torch.bfloat16), tmp_path / "again", config=read_config(out))
    first, second = ((folder / "model.safetensors").read_bytes() for folder in (out, tmp_path / "again"))
    assert first == second
    told = [read_config(folder)["quantization_config"] for folder in (out, tmp_path / "again")]
    assert told[0] == told[1]

    with pytest.raises(ConfigError, match="is quantized already"):
        cli.run(["quantize", str(out), "--output", str(tmp_path / "more")])


def test_rounding_at_load_is_the_command_without_calibration(tmp_path: Path) -> None:
    out = tmp_path / "small"
    words = ["quantize", "--format", "int8", "--output", str(out), "--calibrate-tokens", "0", "--eval-tokens", "0"]
    assert cli.run(words) == 0
    stored, rounded = load(out).state_dict(), load(bundled_model(), quantization="int8").state_dict()
    assert stored.keys() == rounded.keys()
    assert all(torch.equal(stored[name], rounded[name]) for name in stored)
    params = SamplingParams(temperature=0, max_tokens=8, logprobs=1)
    answers = [
        model.generate(["def add(a, b):\n"], params)[0].outputs[0]
        for model in (LLM(out), LLM(bundled_model(), quantization="int8"))
    ]
    assert answers[0].token_ids == answers[1].token_ids
    assert [token.logprob for token in answers[0].logprobs or ()] == [t.logprob for t in answers[1].logprobs or ()]


def test_a_table_may_stay_float_for_other_tools(tmp_path: Path) -> None:
    words = ["quantize", "--no-table", "--output", str(tmp_path), "--calibrate-tokens", "0", "--eval-tokens", "0"]
    assert cli.run(words) == 0
    config = json.loads((tmp_path / "config.json").read_text())
    assert "quantized_embedding" not in config["quantization_config"] and config["dtype"] == "bfloat16"
    assert load(tmp_path, dtype=torch.bfloat16).embed.dtype == torch.bfloat16


# ------------------------------------------------------------------------------------------------ text
def test_text_of_ones_own(tmp_path: Path) -> None:
    """A file, a folder and the text itself; one document is split, several are held out whole."""
    file = tmp_path / "notes.txt"
    file.write_text(TEXT)
    for source in (TEXT, str(file), str(tmp_path)):
        calibration, held = read(bundled_model(), Reading(calibrate=source, calibrate_tokens=300, eval_tokens=300))
        assert 0 < sum(len(batch.ids_T) for batch in held) <= 300
        assert 0 < sum(len(batch.ids_T) for batch in calibration) <= 300
    with pytest.raises(ConfigError, match="names no files"):
        read(bundled_model(), Reading(calibrate="no-such-source"))
    assert read(bundled_model(), Reading(calibrate_tokens=0, eval_tokens=0)) == ([], [])


def test_chats_go_through_the_template(tmp_path: Path) -> None:
    line = {
        "messages": [{"role": "user", "content": "What does len do?"}, {"role": "assistant", "content": "It counts."}]
    }
    (tmp_path / "chats.jsonl").write_text("\n".join([json.dumps(line)] * 20))
    calibration, _ = read(bundled_model(), Reading(calibrate=str(tmp_path / "chats.jsonl"), calibrate_tokens=200))
    assert sum(len(batch.ids_T) for batch in calibration) > 100


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--format", "int5", "--output", "x"], "unknown number format"),
        (["--symmetric", "--asymmetric", "--output", "x"], "exclude each other"),
        (["--method", "gtpq", "--output", "x"], "did you mean 'gptq'"),
        (["--group", "48", "--output", "x"], "group must be"),
        (["--output", str(bundled_model())], "keeping"),
        (["--eval-tokens", "-1", "--output", "x"], "eval_tokens must be 0 or more"),
        ([], "--output"),
    ],
)
def test_wrong_words_are_refused(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        cli.run(["quantize", *words])
