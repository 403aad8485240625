"""A recipe file in, an exit status out: start, go on, or say that all is done; alone, or one rank of many.

The main rank speaks, holds the run's directory, writes its record, trains the tokenizer and prepares the data; the
others wait for it and read.
"""

from __future__ import annotations

import fcntl
import math
import secrets
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console

from ..core import CapacityError, ConfigError, TwofoldError, WorkerError, load_config
from ..parallel import Mesh, Ranks, discover, joined
from ..parallel.layout import Layout, lay_out
from ..parallel.messages import everyone, from_first
from ..parallel.ranks import Meeting
from ..platforms import keep_freed, read_memory
from ..platforms.memory import shortage
from . import adapters, build, card, elastic, plot
from .axes import Axes
from .checkpoint import Checkpoints, Position, read_position
from .config import Recipe
from .draft_head import DraftLesson
from .export import export, export_adapter
from .heartbeat import Heartbeat
from .journal import Journal, Unwritten
from .lesson import Lesson
from .meter import Meter
from .pieces import Stored
from .planning import Machine, laid_out, spec_of
from .profile import around
from .progress import Display
from .saver import Saver
from .state import restore
from .trainer import Data, Sampler, Trainer

FAILED = "failed"
LOST = 1
"""Exit status of a rank that ends because another one failed, and told why."""
GRACE = 0.3
"""Seconds that other ranks give the main one to tell first what may have happened to all."""


class Course:
    """What kind of run it is: the recipe it is read from, its data, and what one of its steps is made of.

    This one reads texts; that of alignment is in `align/`.
    """

    recipe: type[Recipe] = Recipe

    def data(self, recipe: Recipe, words: build.RecipeWords) -> tuple[Data, str]:
        """What is read, and a fingerprint of it. The main rank is the first to ask; the others find what it made."""
        return build.build_data(recipe, words)

    def lesson(self, recipe: Recipe, data: Data, words: build.RecipeWords) -> Lesson:
        """What a step is made of."""
        return Lesson() if recipe.draft_head is None else DraftLesson(recipe)


def run(
    source: str | Path | Mapping[str, Any],
    overrides: Mapping[str, Any] | None = None,
    *,
    fresh: bool = False,
    sampler: Sampler | None = None,
    console: Console | None = None,
    profiles: Collection[str] = (),
    course: Course | None = None,
) -> int:
    """Train a recipe (a file, or the tables of one) to its end, from its newest whole checkpoint when there is one.

    `overrides` maps dotted keys ("optimizer.lr") to values that win over it. `fresh` removes the run's
    checkpoints and log first. `profiles` ("modules", "collectives") are said after a few steps. Returns 0 when the run
    is finished, 75 when a signal stopped it and it saved. Of several ranks that fail the first to do so raises, and the
    others return 1.

    Raises:
        ConfigError: the recipe is wrong, differs from the run it would continue, or its directory is in use.
    """
    ranks, course = discover(), course or Course()
    try:
        recipe = load_config(course.recipe, source, overrides)
        recipe.elastic.admit(ranks.world)
        layout = lay_out(recipe.parallel, ranks.world, ranks.local_world)
    except ConfigError:
        if ranks.local_rank:
            return LOST
        raise
    with joined(ranks, timeout=recipe.parallel.timeout) as meeting:
        try:
            torch.set_num_threads(recipe.run.threads)
            keep_freed()
            torch.manual_seed(recipe.run.seed)
            mesh = Mesh(_settled(recipe, layout, ranks), ranks.rank)
            display = Display(recipe.schedule.steps, console if ranks.main else Console(quiet=True))
            with _held(recipe.run.output, mesh) as attempt:
                return _Run(recipe, mesh, meeting, display, attempt, course).to_its_end(fresh, sampler, profiles)
        except Exception as error:
            if not ranks.main:
                time.sleep(GRACE)
            if not meeting.first(FAILED):
                return LOST
            raise _named(error, ranks) from None


def _settled(recipe: Recipe, layout: Layout, ranks: Ranks) -> Layout:
    """The layout, its `zero = "auto"` by what fits: the first rank's memory decides for all, so that all agree."""
    if layout.world == 1 or recipe.parallel.zero != "auto":
        return layout
    free = int(from_first(read_memory().available, dist.group.WORLD))
    return laid_out(recipe, spec_of(recipe), ranks.world, Machine(available=free, node=ranks.local_world))


@dataclass(frozen=True)
class _Run:
    recipe: Recipe
    mesh: Mesh
    meeting: Meeting
    display: Display
    attempt: str
    course: Course

    def to_its_end(self, fresh: bool, sampler: Sampler | None, profiles: Collection[str]) -> int:
        recipe, say, output = self.recipe, self.display.say, self.recipe.run.output
        data, axes = recipe.data, recipe.parallel
        shares = elastic.lines(
            recipe.elastic, data.tokens_per_step, data.micro_tokens, data.seq_len, axes.tp * axes.sp * axes.pp
        )
        for line in (*self.mesh.layout.why, *shares):
            say(line)
        checkpoints = Checkpoints(output / "checkpoints", recipe.run.keep_last, recipe.run.keep_every)
        if fresh and self.mesh.main:
            checkpoints.clear()
            (output / card.EVALUATION).unlink(missing_ok=True)
        found, notes = checkpoints.latest(self.mesh.group("world"))
        for note in notes:
            say(note)
        position = read_position(found) if found else None
        if position:
            _same_recipe(recipe, position, output)
            there = from_first(adapters.result(recipe).is_dir(), self.mesh.group("world"))
            if position.step == recipe.schedule.steps and there:
                say(f"{output}: finished, all {position.step} steps are done; {adapters.said(recipe)}")
                return 0
        with _what_would_fit(recipe):
            trainer = self._assemble(found, position, checkpoints, sampler)
            trainer.around = around(profiles, trainer.decoder, output, say)
            try:
                status = trainer.fit()
                if status == 0:
                    trainer.lesson.finish(trainer)  # before the model, by which a run is known to be finished
                    if recipe.lora:
                        export_adapter(trainer, output / "adapter")
                    if not adapters.quantized(recipe):
                        export(trainer, output / "model", self._card(trainer))
                if self.mesh.main:
                    say(plot.terminal(trainer.journal.curve(trainer.lesson.curve)))
                if status == 0:
                    say(f"finished {recipe.schedule.steps} steps; {adapters.said(recipe)}")
            finally:
                trainer.lesson.close()
                trainer.journal.close()
                trainer.optimizer.offload.close()
        self.mesh.wait()
        return status

    def _card(self, trainer: Trainer) -> Callable[[Path], None]:
        """What writes the model's card, of the run as it stands now."""
        output, at = self.recipe.run.output, trainer.position
        trained = card.training(self.recipe.identity(), at.step, at.tokens, trainer.journal.rows)
        return lambda directory: card.put(directory, trained, output / card.EVALUATION, output.name)

    def _assemble(
        self, found: Path | None, position: Position | None, checkpoints: Checkpoints, sampler: Sampler | None
    ) -> Trainer:
        """Put the collaborators together, in one fixed order: words, data, model, optimizer, then what was saved."""
        recipe, mesh, display = self.recipe, self.mesh, self.display
        with self.meeting.after("data", mesh.main, FAILED):
            words = build.build_words(recipe)
            data, fingerprint = self.course.data(recipe, words)
        if position and position.data != fingerprint:
            raise ConfigError(
                f"the training data is not what {recipe.run.output} was trained on: bring the old files back, "
                "give another run.output, or start over with --fresh"
            )
        base = adapters.fingerprint(recipe)
        if position and position.base != base:
            what = "adapters" if recipe.lora else "draft head's weights"
            raise ConfigError(
                f"{recipe.model.from_} is not the model that the {what} of {recipe.run.output} were trained on: "
                "bring it back, give another run.output, or start over with --fresh"
            )
        axes, offload = Axes(mesh, recipe.parallel), build.build_offload(recipe, mesh)
        decoder, zero, places = build.build_model(recipe, found, axes, offload)
        build.check_vocabulary(places.spec, words)
        optimizer = build.build_optimizer(decoder, recipe, axes, offload)
        scaler = build.build_scaler(recipe)
        if found and position:
            restore(Stored(found), position, decoder, places, optimizer, mesh)
            scaler.load(position.scaler)
            display.say(f"going on from {found.name}")
        parameters = sum(map(math.prod, places.whole.values()))
        many = "" if mesh.alone else f", {mesh.size('world')} ranks ({mesh.layout})"
        size = f"{parameters / 1e6:.2f}M parameters"
        if recipe.lora:
            size += f" ({sum(math.prod(places.whole[name]) for name in optimizer.weights) / 1e6:.3f}M in adapters)"
        display.say(f"{recipe.run.output}: {size}, {recipe.schedule.steps} steps{many}")
        step = position.step if position else 0
        files = build.run_files(recipe, decoder)
        behind = recipe.run.save_behind and recipe.offload == type(recipe.offload)()
        trainer = Trainer(
            decoder,
            optimizer,
            data,
            recipe,
            saver=Saver(checkpoints, files, mesh, attempt=self.attempt, behind=behind),
            journal=Journal(recipe.run.output, step) if mesh.main else Unwritten(),
            display=display,
            words=words,
            sampler=sampler,
            position=position or Position(data=fingerprint, base=base, recipe=recipe.identity()),
            scaler=scaler,
            axes=axes,
            zero=zero,
            places=places,
            heart=Heartbeat(recipe.run.output / "hang", mesh, recipe.elastic.heartbeat, self.attempt),
            meter=Meter.of(places.spec, decoder) if mesh.main else None,
            lesson=self.course.lesson(recipe, data, words),
        )
        trainer.lesson.begin(trainer, Stored(found) if found else None)
        return trainer


def _same_recipe(recipe: Recipe, position: Position, output: Path) -> None:
    changed = recipe.changes(position.recipe)
    if changed:
        lines = "; ".join(f"{key} was {was!r}, is {now!r}" for key, (was, now) in changed.items())
        raise ConfigError(
            f"{output} holds a run of another recipe: {lines}. Undo the change, give another run.output, "
            "or start over with --fresh"
        )


def _named(error: Exception, ranks: Ranks) -> Exception:
    """The error with the rank that met it, where there are others, and with what to do when a process was lost."""
    if isinstance(error, WorkerError):
        error = WorkerError(f"{error}; the same command goes on from the newest checkpoint")
    if isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error)):
        return WorkerError(
            f"rank {ranks.rank} lost another rank ({str(error).splitlines()[0]}); what it said is above, or in what "
            "started it. The same command goes on from the newest checkpoint"
        )
    if ranks.main:
        return error
    if isinstance(error, TwofoldError):
        return type(error)(f"rank {ranks.rank}: {error}")
    error.add_note(f"on rank {ranks.rank} of {ranks.world}")
    return error


@contextmanager
def _held(output: Path, mesh: Mesh) -> Iterator[str]:
    """Hold the run directory for all ranks; gives a name for this attempt, by which all see that it is one directory.

    Raises:
        ConfigError: another run has it, or a rank does not see what the main one writes there.
    """
    if not mesh.main:
        yield _met(output, mesh)
        return
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"run.output: {output} cannot be a directory: {error.strerror}") from None
    with _alone(output):
        yield _met(output, mesh)


def _met(output: Path, mesh: Mesh) -> str:
    sign, group = output / ".attempt", mesh.group("world")
    if mesh.main:
        sign.write_text(secrets.token_hex(6), encoding="utf-8")
    attempt = str(from_first(sign.read_text(encoding="utf-8") if mesh.main else "", group))
    seen = everyone(sign.is_file() and sign.read_text(encoding="utf-8") == attempt, group)
    if not all(seen):
        raise ConfigError(
            f"rank {seen.index(False)} does not see {output} as rank 0 does: run.output must be in a directory that "
            "all machines share"
        )
    return attempt


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
