"""A recipe file in, an exit status out: start, go on, or say that all is done."""

from __future__ import annotations

import fcntl
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from ..core import CapacityError, ConfigError, load_config
from ..platforms.memory import shortage
from . import build, plot
from .checkpoint import Checkpoints, Position, read_optimizer, read_position, replace_directory
from .config import Recipe
from .journal import Journal
from .meter import Meter
from .profile import around
from .progress import Display
from .trainer import Sampler, Trainer


def run(
    recipe_path: str | Path,
    overrides: Mapping[str, Any] | None = None,
    *,
    fresh: bool = False,
    sampler: Sampler | None = None,
    console: Console | None = None,
    profiles: Collection[str] = (),
) -> int:
    """Train `recipe_path` to its end, from its newest whole checkpoint when there is one.

    `overrides` maps dotted keys ("optimizer.lr") to values that win over the file. `fresh` removes the run's
    checkpoints and log first. `profiles` ("modules", "collectives") are said after a few steps. Returns 0 when the run
    is finished, 75 when a signal stopped it and it saved.

    Raises:
        ConfigError: the recipe is wrong, differs from the run it would continue, or its directory is in use.
    """
    recipe = load_config(Recipe, recipe_path, overrides)
    output = recipe.run.output
    output.mkdir(parents=True, exist_ok=True)
    with _alone(output):
        torch.set_num_threads(recipe.run.threads)
        torch.manual_seed(recipe.run.seed)
        display = Display(recipe.schedule.steps, console)
        checkpoints = Checkpoints(output / "checkpoints", recipe.run.keep_last)
        if fresh:
            checkpoints.clear()
        found, notes = checkpoints.latest()
        for note in notes:
            display.say(note)
        position = read_position(found) if found else None
        if position:
            _same_recipe(recipe, position, output)
            if position.step == recipe.schedule.steps and (output / "model").is_dir():
                display.say(f"{recipe_path}: finished, all {position.step} steps are done; the model is {output}/model")
                return 0
        with _what_would_fit(recipe):
            trainer = _assemble(recipe, found, position, checkpoints, display, sampler)
            trainer.around = around(profiles, trainer.decoder, output, display.say)
            try:
                status = trainer.fit()
                display.say(plot.terminal(trainer.journal.curve("loss")))
                if status == 0:
                    replace_directory(output / "model", build.exporter(trainer.decoder, recipe))
                    display.say(f"finished {recipe.schedule.steps} steps; the model is {output / 'model'}")
            finally:
                trainer.journal.close()
                trainer.optimizer.offload.close()
        return status


def _assemble(
    recipe: Recipe,
    found: Path | None,
    position: Position | None,
    checkpoints: Checkpoints,
    display: Display,
    sampler: Sampler | None,
) -> Trainer:
    """Put the collaborators together, in one fixed order: words, data, model, optimizer, then what was saved."""
    words = build.build_words(recipe)
    data, fingerprint = build.build_data(recipe, words)
    if position and position.data != fingerprint:
        raise ConfigError(
            f"the training data is not what {recipe.run.output} was trained on: bring the old files back, "
            "give another run.output, or start over with --fresh"
        )
    offload = build.build_offload(recipe)
    decoder = build.build_model(recipe, found, offload)
    build.check_vocabulary(decoder, words)
    optimizer, scaler = build.build_optimizer(decoder, recipe, offload=offload), build.build_scaler(recipe)
    if found and position:
        optimizer.load(read_optimizer(found))
        scaler.load(position.scaler)
        torch.set_rng_state(torch.tensor(list(bytes.fromhex(position.rng)), dtype=torch.uint8))
        display.say(f"going on from {found.name}")
    parameters = sum(p.numel() for p in decoder.parameters())
    display.say(f"{recipe.run.output}: {parameters / 1e6:.2f}M parameters, {recipe.schedule.steps} steps")
    return Trainer(
        decoder,
        optimizer,
        data,
        recipe,
        checkpoints=checkpoints,
        journal=Journal(recipe.run.output, position.step if position else 0),
        display=display,
        write_model=build.writer(decoder, recipe),
        words=words,
        sampler=sampler,
        scaler=scaler,
        position=position or Position(data=fingerprint, recipe=recipe.identity()),
        meter=Meter.of(decoder.spec, decoder),
    )


def _same_recipe(recipe: Recipe, position: Position, output: Path) -> None:
    changed = recipe.changes(position.recipe)
    if changed:
        lines = "; ".join(f"{key} was {was!r}, is {now!r}" for key, (was, now) in changed.items())
        raise ConfigError(
            f"{output} holds a run of another recipe: {lines}. Undo the change, give another run.output, "
            "or start over with --fresh"
        )


@contextmanager
def _what_would_fit(recipe: Recipe) -> Iterator[None]:
    """Turn an allocation that failed into one line that says what would need less."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        lacked = shortage(error)
        if lacked is None:
            raise
        advice = [
            f'offload.{f.name} = "disk"' for f in fields(recipe.offload) if getattr(recipe.offload, f.name) == "none"
        ]
        if recipe.model.recompute == "none":
            advice.append('model.recompute = "full"')
        advice.append("fewer data.micro_tokens")
        raise CapacityError(f"out of memory: {lacked}. What would need less: {', '.join(advice)}") from None


@contextmanager
def _alone(output: Path) -> Iterator[None]:
    """Hold the run directory for this process; the lock goes with the process, however it ends."""
    with (output / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConfigError(f"{output} is in use by another run: wait for it, or give another run.output") from None
        yield
