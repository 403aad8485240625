"""Trainer: the loop that turns batches into weights, and the few things it works with.

    data.batch(step) ──> step(batch, loss) ──> journal, display        every step
                         evaluate()                                    every eval_every
                         sample()  the serving engine on these weights every sample.every
                         save()    checkpoints                         every save_every, on a signal, at the end

Everything that decides the weights is a function of the recipe and the step, or is in the checkpoint: a run that was
stopped and started again computes the bits of one that never was.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch

from ..core import TwofoldError
from ..data import Batch
from ..models.decoder import Decoder
from . import fault, plot
from . import loss as losses
from .axes import Axes
from .checkpoint import Position
from .config import Recipe, SampleConfig
from .journal import Journal
from .meter import Meter
from .moe import Routers
from .optimizer import Optimizer
from .places import Places
from .progress import Display
from .saver import Saver, Snapshot
from .scaler import LossScaler
from .schedule import lr_at
from .state import gathered, state_pieces, weight_pieces
from .stop import Stop
from .zero import Zero

STOPPED = 75
"""Exit status of a run that was asked to stop and saved first (EX_TEMPFAIL: run it again to go on)."""

Sampler = Callable[[Decoder, Sequence[list[int]], SampleConfig, tuple[int, ...]], list[list[int]]]
"""(decoder, prompts as ids, settings, ids that end a text) to each one's new ids; the door makes it with the engine."""


class Loader(Protocol):
    """Batches by number: the whole state of the data is one integer."""

    def batch(self, index: int) -> Batch: ...


class Words(Protocol):
    """How sample prompts become ids and answers become text."""

    @property
    def eos_ids(self) -> tuple[int, ...]: ...

    def prompt(self, text: str) -> list[int]: ...

    def text(self, ids: list[int]) -> str: ...


@dataclass(frozen=True, kw_only=True)
class Step:
    """What one step did: mean loss in nats a target, targets, gradient norm before the clip, and why it was skipped.

    `overflow`: because the loss scale was too large, which happens now and then, and has been seen to.
    """

    loss: float
    targets: int
    lr: float
    grad_norm: float
    skipped: str | None = None
    overflow: bool = False
    figures: dict[str, float] = field(default_factory=dict)
    """What else the journal keeps: how a mixture's experts were used."""


@dataclass(frozen=True, kw_only=True)
class Data:
    """Training batches by number and the fixed held-out ones."""

    train: Loader
    valid: Sequence[Batch]


class Trainer:
    """A decoder, its optimizer and its data; a run's directory to write to; `fit` does a whole recipe."""

    def __init__(
        self,
        decoder: Decoder,
        optimizer: Optimizer,
        data: Data,
        recipe: Recipe,
        *,
        saver: Saver,
        journal: Journal,
        display: Display,
        words: Words,
        sampler: Sampler | None = None,
        scaler: LossScaler | None = None,
        position: Position | None = None,
        axes: Axes | None = None,
        zero: Zero[Decoder] | None = None,
        places: Places | None = None,
        meter: Meter | None = None,
        around: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self.meter, self.around = meter, around
        self.decoder, self.optimizer, self.data, self.recipe = decoder, optimizer, data, recipe
        self.axes = axes or Axes()
        self.mesh = self.axes.mesh
        self.zero = zero or Zero(decoder, self.mesh)
        self.places = places or Places(decoder, self.axes)
        self.saver, self.journal, self.display = saver, journal, display
        self.words, self.sampler = words, sampler
        self.scaler = scaler or LossScaler()
        self.position = position or Position()
        within = self.mesh.group("tp") if self.axes.config.sequence else None
        self.routers = Routers(decoder, recipe.moe, recipe.run.seed, self.mesh.group("tokens"), within)
        self._saved_at = self.position.step if position else -1

    # ---------------------------------------------------------------------------------------- one step
    def step(self, batch: Batch, loss: losses.Loss = losses.next_token) -> Step:
        """One optimizer step over all of `batch`, in micro-batches of whole sequences, each rank its share.

        The loss is the sum over all targets divided by their number, whatever the split. A step whose loss or gradient
        is not finite changes no weight, on any rank.

        Raises:
            TwofoldError: the gradient overflowed at the least loss scale.
        """
        config = self.recipe.optimizer
        lr = lr_at(self.position.step, config.lr, self.recipe.schedule)
        targets = int((batch.targets_T != losses.IGNORE).sum())
        if not targets:
            return Step(loss=0.0, targets=0, lr=lr, grad_norm=0.0, skipped="the batch has no target")
        self.optimizer.zero()
        self.routers.begin(self.position.step, len(batch.ids_T), self.scaler.scale)
        summed = self._pass(batch, targets / self.scaler.scale, loss)
        self.axes.collect(self.decoder)
        self.optimizer.collect()  # what a pipeline leaves where it is
        mean = self.mesh.sum("loss", summed)[0] / targets
        done = Step(loss=mean, targets=targets, lr=lr, grad_norm=self.optimizer.clip(self.scaler.scale))
        finite = math.isfinite(done.loss) and math.isfinite(done.grad_norm)
        done = replace(done, figures=self.routers.end(moved=finite))
        if finite:
            self.optimizer.step(lr)
            self.scaler.update(None)
        else:
            done = self._skip(done, batch)
        self.optimizer.zero()
        return done

    def _skip(self, done: Step, batch: Batch) -> Step:
        """The step as one that changed nothing: what was not finite and where first, and the next loss scale."""
        spoiled, scale = not math.isfinite(done.loss), self.scaler.scale
        parts = self.axes.share(batch, self.recipe.data.micro_tokens)
        why = fault.explain(
            self.decoder,
            ((name, self.optimizer.gradient(name)) for name in self.optimizer.weights),
            lambda: [self._score(part) for part in (parts if spoiled else parts[:1])],
            spoiled,
            lambda flags: self.mesh.sum("replicate", *self.mesh.sum("zero", *self.mesh.sum("tp", *flags))),
        )
        why += f" (batch {self.position.step})"
        self.scaler.update(why)
        if self.scaler.dynamic:
            why += f", at loss scale {scale:g}, from here {self.scaler.scale:g}"
        return replace(done, skipped=why, overflow=self.scaler.dynamic and not spoiled)

    def _pass(self, batch: Batch, total: float, loss: losses.Loss) -> float:
        """Forward and backward over this rank's share of a batch, of (sum / `total`); its part of the summed loss."""
        parts = self.axes.share(batch, self.recipe.data.micro_tokens)
        if self.axes.pipeline:
            return self.axes.pipeline.run([self.axes.place(part) for part in parts], total, self.decoder, loss)
        summed = 0.0
        for number, part in enumerate(parts, 1):
            self.zero.micro_batch(last=number == len(parts))
            ids_T, targets_T, ctx = self.axes.place(part)
            hidden_TD = self.decoder(ids_T, ctx)
            summed += losses.backward(self.decoder, hidden_TD, targets_T, total, self.places.spec.vocab, loss)
            self.optimizer.collect()
        return summed

    @torch.no_grad()
    def evaluate(self) -> float:
        """Mean loss over the held-out batches, in nats a target."""
        summed, count = 0.0, 0.0
        for batch in self.data.valid:
            for part in self.axes.share(batch, self.recipe.data.micro_tokens):
                more, rows = self._score(part)
                summed, count = summed + more, count + rows
        summed, count = self.mesh.sum("loss", summed, count)
        return summed / count if count else math.nan

    def _score(self, part: Batch) -> tuple[float, int]:
        """The summed loss and the number of targets of one micro-batch; called without gradients."""
        ids_T, targets_T, ctx = placed = self.axes.place(part)
        if self.axes.pipeline:
            return self.axes.pipeline.evaluate(placed, self.decoder)
        hidden_TD = self.decoder(ids_T, ctx)
        return losses.evaluate(self.decoder, hidden_TD, targets_T, self.places.spec.vocab)

    # ---------------------------------------------------------------------------------------- the loop
    def fit(self) -> int:
        """Train to the last step, from wherever the run stands; 0 when done, STOPPED when asked to stop."""
        steps = self.recipe.schedule.steps
        with Stop() as stop, self.display:
            clock = _Clock()
            while self.position.step < steps:
                self._advance(clock)
                asked, failed = self.mesh.sum("world", float(stop.asked is not None), float(self.saver.failed))
                if failed:
                    self.saver.wait()
                if asked and self.position.step < steps:
                    self.save()
                    self.saver.wait()
                    why = stop.asked or "another rank was told to stop"
                    self.display.say(f"{why}: saved at step {self.position.step}; the same command goes on from here")
                    return STOPPED
            self.save()
            self.saver.wait()
        return 0

    def _advance(self, clock: _Clock) -> None:
        run, at = self.recipe.run, self.position
        clock.start()
        batch = self.data.train.batch(at.step)
        with self.around():
            done = self.step(batch)
        clock.stop(len(batch.ids_T), self.meter.work(batch.lengths, done.targets) if self.meter else 0)
        self.position = replace(
            at,
            step=at.step + 1,
            tokens=at.tokens + len(batch.ids_T),
            skipped=at.skipped + (done.skipped is not None),
            skips_in_row=at.skips_in_row + (not done.overflow) if done.skipped else 0,
            loss=at.loss if done.skipped else done.loss,
        )
        step, last = self.position.step, self.position.step == self.recipe.schedule.steps
        self._report(done, clock, step % run.log_every == 0 or last)
        if self.data.valid and (step % run.eval_every == 0 or last):
            value = self.evaluate()
            self.journal.add(step, valid_loss=value)
            self.display.say(f"step {step}: validation loss {value:.4f}")
            self._draw()
        if self.recipe.sample.prompts and (step % self.recipe.sample.every == 0 or last):
            self.sample()
        if step % run.save_every == 0:
            self.save()
        self.optimizer.offload.settle()

    def _report(self, done: Step, clock: _Clock, log: bool) -> None:
        step = self.position.step
        if done.skipped:
            self.journal.add(step, skipped=done.skipped)
            self.display.say(f"step {step} skipped: {done.skipped} ({self.position.skipped} so far)")
            if self.position.skips_in_row >= self.recipe.optimizer.max_skips:
                raise TwofoldError(
                    f"{self.position.skips_in_row} steps in a row were skipped, the last (step {step}) because "
                    f"{done.skipped}: lower optimizer.lr, lengthen schedule.warmup, or train in fp32"
                )
            return
        speed = clock.tokens_per_second
        machine = self.meter.figures(clock.flops_per_second / self.mesh.layout.world) if self.meter else {}
        if log:
            self.journal.add(
                step,
                loss=done.loss,
                lr=done.lr,
                grad_norm=done.grad_norm,
                tokens=self.position.tokens,
                tokens_per_second=round(speed, 1),
                **done.figures,
                **({"loss_scale": self.scaler.scale} if self.scaler.dynamic else {}),
                **machine,
            )
        left = clock.seconds_per_step * (self.recipe.schedule.steps - step)
        self.display.step(
            step, loss=done.loss, lr=done.lr, grad_norm=done.grad_norm, speed=speed, seconds_left=left, **machine
        )

    # ---------------------------------------------------------------------------------------- besides stepping
    def sample(self) -> None:
        """Let the serving engine answer the recipe's prompts with the weights as they are."""
        if self.sampler is None:
            return
        config = self.recipe.sample
        prompts = [self.words.prompt(text) for text in config.prompts]
        answers: list[list[int]] = []
        with torch.no_grad(), self._whole() as decoder:
            if self.mesh.main and decoder is not None:
                answers = self.sampler(decoder, prompts, config, self.words.eos_ids)
        if not self.mesh.main:
            return
        for prompt, ids in zip(config.prompts, answers, strict=True):
            text = self.words.text(ids)
            self.journal.add(self.position.step, prompt=prompt, text=text)
            self.display.say(f"  {prompt!r} -> {text!r}")

    @contextmanager
    def _whole(self) -> Iterator[Decoder | None]:
        """The decoder that the main rank samples from: as ZeRO gathers it, or put together from every axis."""
        if self.axes.tensor or self.axes.pipeline:
            self.zero.settle()
            pieces = weight_pieces(self.decoder, self.places, self.zero.dtype)
            yield gathered(pieces, self.places.spec, self.zero.dtype, self.mesh)
            return
        with self.zero.whole() as decoder:
            yield decoder

    def save(self) -> None:
        """Write a checkpoint of this step, unless it is there; what the run waits for is the saver's to say."""
        if self._saved_at == self.position.step:
            return
        self.journal.sync()
        self.zero.settle()
        dtype, places = self.zero.dtype, self.places
        self.saver.save(
            Snapshot(
                position=replace(self.position, scaler=self.scaler.state()),
                weights=weight_pieces(self.decoder, places, dtype),
                states=state_pieces(self.decoder, places, self.optimizer, self.mesh, dtype),
            )
        )
        self._saved_at = self.position.step

    def _draw(self) -> None:
        if not self.mesh.main:
            return
        curves = {"training": self.journal.curve("loss"), "validation": self.journal.curve("valid_loss")}
        picture = plot.svg(curves, title=f"{self.recipe.run.output.name}: loss")
        (self.recipe.run.output / "loss.svg").write_text(picture, encoding="utf-8")


class _Clock:
    """Time spent stepping, without validation, samples and saves; smoothed over about twenty steps."""

    def __init__(self) -> None:
        self.seconds_per_step = 0.0
        self.tokens_per_second = 0.0
        self.flops_per_second = 0.0
        self._began = 0.0

    def start(self) -> None:
        self._began = time.perf_counter()

    def stop(self, tokens: int, flops: int = 0) -> None:
        seconds = max(time.perf_counter() - self._began, 1e-9)
        self.seconds_per_step = _smooth(self.seconds_per_step, seconds)
        self.tokens_per_second = _smooth(self.tokens_per_second, tokens / seconds)
        self.flops_per_second = _smooth(self.flops_per_second, flops / seconds)


def _smooth(old: float, new: float) -> float:
    return old + (new - old) * 0.1 if old else new
