"""`twofold quantize`: a float checkpoint rounded to int8, int4 or fp8, on real text, measured before and after."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from ..core import CapacityError, ConfigError
from ..data import SOURCES, ChatTemplate, Corpus, Document, PackedLoader, Tokenizer, Wording, documents
from ..data.dataset import Chat, Text
from ..data.order import permutation
from ..data.pack import Batch
from ..engine.capacity import DTYPES, weight_bytes
from ..models import Decoder, PackedContext, load, read_config, read_spec, save
from ..models.calibration import quantize as rounded
from ..models.quantized import KEY, sites
from ..platforms import read_memory
from ..quant.calibrate import Told
from ..quant.config import Reading, Recipe
from ..quant.format import named
from .bytes import human
from .plan import checkpoint_bytes

HELD_OUT = 0.02
"""The share of documents that is measured on, never calibrated on; the bundled model was not trained on these."""
TOKENS, ROWS = 2048, 256
"""Tokens of one forward pass, and rows whose logits are made at once."""

Tick = Callable[[str], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """What quantizing did: perplexity before and after (None when no text was held out), and each weight's error."""

    before: float | None
    after: float | None
    weights: Sequence[Told]

    @property
    def cost(self) -> float | None:
        """How much perplexity grew, as a share."""
        return self.after / self.before - 1 if self.before is not None and self.after is not None else None


def quantize(model: Path, output: Path, recipe: Recipe, reading: Reading) -> int:
    """Write the quantized checkpoint and print what it cost and saved; exit code 0."""
    config = read_config(model)
    if output.resolve() == model.resolve():
        raise ConfigError(f"--output is {model} itself: name another directory, the float weights are worth keeping")
    if config.get(KEY):
        raise ConfigError(f"{model} is quantized already: give the float checkpoint it was made from")
    read_spec(model).speaking()
    _check_memory(model)
    print(f"format        {named(recipe.name).describe()}")
    calibration, held_out = read(model, reading)
    print(f"text          {_count(calibration)} tokens to calibrate on, {_count(held_out)} held out to measure on")
    decoder = load(model, dtype=stored_dtype(model))
    with _Bar(2 * len(held_out) + len(sites(decoder))) as tick:
        report = run(decoder, recipe, calibration, held_out, tick)
    for name, told in groupby(report.weights, key=lambda told: ".".join(told.name.split(".")[:2])):
        parts = [(weight.name.removeprefix(name).lstrip(".") or "rows", weight) for weight in told]
        print(f"{name:<14}" + "   ".join(f"{part} {weight.error:.2%} of {weight.of}" for part, weight in parts))
    save(decoder, output, config=config)
    copy_rest(model, output)
    if report.cost is not None:
        print(f"perplexity    {report.before:.4f} before, {report.after:.4f} after ({report.cost:+.3%})")
    small, large = checkpoint_bytes(output), checkpoint_bytes(model)
    print(f"bytes         {human(large)} before, {human(small)} after ({1 - small / large:.0%} saved)")
    print(f"written       {output}")
    return 0


def run(
    decoder: Decoder, recipe: Recipe, calibration: Sequence[Batch], held_out: Sequence[Batch], tick: Tick | None = None
) -> Report:
    """Quantize a decoder in place, measuring before and after."""
    step = tick or (lambda words: None)
    before = perplexity(decoder, held_out, step) if held_out else None
    told = []
    for weight in rounded(decoder, recipe, calibration):
        told.append(weight)
        step(f"rounded {weight.name}")
    after = perplexity(decoder, held_out, step) if held_out else None
    return Report(before=before, after=after, weights=told)


@torch.inference_mode()
def perplexity(decoder: Decoder, batches: Sequence[Batch], tick: Tick) -> float:
    """exp of the mean negative log-probability of every target."""
    total, count = 0.0, 0
    for batch in batches:
        hidden_TD = decoder(batch.ids_T, PackedContext(batch.lengths))
        learned_T = batch.targets_T >= 0
        rows, targets = hidden_TD[learned_T], batch.targets_T[learned_T]
        for some, wanted in zip(rows.split(ROWS), targets.split(ROWS), strict=True):
            logp_RV = torch.log_softmax(decoder.logits(some), -1)
            total -= float(logp_RV.gather(1, wanted[:, None]).double().sum())
        count += len(targets)
        tick("measured")
    return math.exp(total / count)


# -------------------------------------------------------------------------------------------------- text
def read(model: Path, reading: Reading) -> tuple[list[Batch], list[Batch]]:
    """Batches to calibrate on and batches held out: other documents, or the end of the text when there is but one.

    Raises:
        ConfigError: no such file or source, or no text in it.
    """
    if not reading.calibrate_tokens and not reading.eval_tokens:
        return [], []
    found = list(_documents(reading.calibrate))
    kept = [document for document in found if not document.held_out(HELD_OUT)]
    held = [document for document in found if document.held_out(HELD_OUT)]
    wording = _wording(model, found)
    seq_len = min(reading.seq_len, read_spec(model).max_len)
    calibration = _encoded(kept, wording, reading.calibrate_tokens, reading.seed)
    if held:
        measured = _encoded(held, wording, reading.eval_tokens, reading.seed)
    else:
        calibration, measured = _split(calibration)
    return (
        _batches(calibration, reading.calibrate_tokens, seq_len, reading.seed),
        _batches(measured, reading.eval_tokens, seq_len, reading.seed),
    )


def _documents(source: str) -> Iterator[Document]:
    """The documents of a source; what is neither a name nor a path, and has a space in it, is the text itself."""
    plain = source not in SOURCES and len(source.split()) > 1
    if plain and ("\n" in source or not Path(source[:255]).exists()):
        return iter([Document(Text(source))])
    return documents(source)


def _wording(model: Path, found: Sequence[Document]) -> Wording:
    chats = any(isinstance(document.content, Chat) for document in found)
    return Wording(Tokenizer.load(model), ChatTemplate.load(model) if chats else None)


Encoded = list[tuple[list[int], list[bool]]]


def _encoded(found: Sequence[Document], wording: Wording, tokens: int, seed: int) -> Encoded:
    """Documents in a shuffled order, until there are twice as many tokens as are wanted."""
    pairs: Encoded = []
    total = 0
    for index in permutation(len(found), seed).tolist():
        ids, _ = wording.document(found[index])
        pairs.append((ids, [True] * len(ids)))
        total += len(ids)
        if total >= 2 * tokens:
            break
    return pairs


def _split(pairs: Encoded) -> tuple[Encoded, Encoded]:
    """The last fifth of all tokens apart."""
    ids = [token for document, _ in pairs for token in document]
    cut = len(ids) - len(ids) // 5
    return [(ids[:cut], [True] * cut)], [(ids[cut:], [True] * (len(ids) - cut))]


def _batches(pairs: Encoded, tokens: int, seq_len: int, seed: int) -> list[Batch]:
    if not tokens or sum(len(ids) - 1 for ids, _ in pairs) < 1:
        return []
    size = min(TOKENS, tokens)
    loader = PackedLoader(Corpus.of(pairs), seq_len=seq_len, tokens_per_batch=size, seed=seed)
    return list(loader.once(-(-tokens // size)))


def _count(batches: Sequence[Batch]) -> int:
    return sum(len(batch.ids_T) for batch in batches)


# -------------------------------------------------------------------------------------------------- files
def stored_dtype(model: Path) -> torch.dtype:
    """What a checkpoint's weights are kept in, by its config.json."""
    config = read_config(model)
    return DTYPES.get(str(config.get("dtype") or config.get("torch_dtype")), torch.float32)


def copy_rest(model: Path, output: Path) -> None:
    """What belongs to a checkpoint beside its weights: tokenizer, template, sampling defaults."""
    for path in sorted(model.iterdir()):
        if path.suffix in (".json", ".jinja", ".txt", ".model") and path.is_file():
            if path.name == "config.json" or path.name.endswith(".index.json"):
                continue
            shutil.copyfile(path, output / path.name)


def _check_memory(model: Path) -> None:
    """Refuse before anything is loaded. The widest moment is the float weights and their codes."""
    needs, free = int(1.6 * weight_bytes(read_spec(model), stored_dtype(model))), read_memory().available
    if needs > free:
        raise CapacityError(
            f"{model} needs about {human(needs)} to be quantized with its layers in memory, and {human(free)} is free: "
            "use a larger machine, or round while loading with --quantization"
        )


class _Bar:
    """A progress bar over forward passes and weights, on standard error."""

    def __init__(self, steps: int) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self._progress = Progress(*columns, console=Console(stderr=True), transient=True)
        self._task = self._progress.add_task("measuring", total=steps)

    def __enter__(self) -> Tick:
        self._progress.start()

        def tick(words: str) -> None:
            self._progress.update(self._task, description=words, advance=1)

        return tick

    def __exit__(self, *_: object) -> None:
        self._progress.stop()
