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
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from ..core import ConfigError, TwofoldError
from ..data import Batch
from ..models.decoder import Decoder
from . import fault, plot
from . import loss as losses
from .axes import Axes
from .checkpoint import Position
from .config import Recipe, SampleConfig
from .heartbeat import Heartbeat
from .journal import Journal
from .lesson import GivenUp, Lesson
from .meter import Meter
from .moe import Routers
from .objective import NEXT_TOKEN, Objective, Sums
from .optimizer import Optimizer
from .places import Places
from .progress import Display
from .rewind import rewind
from .saver import Saver, Snapshot
from .scaler import LossScaler
from .schedule import lr_at
from .spikes import Spikes
from .state import gathered, state_pieces, weight_pieces
from .step import Clock, Step
from .stop import Stop
from .zero import Zero

STOPPED = 75
"""Exit status of a run that was asked to stop and saved first (EX_TEMPFAIL: run it again to go on)."""

Sampler = Callable[[Decoder, Sequence[list[int]], SampleConfig, tuple[int, ...]], list[list[int]]]
"""(decoder, prompts as ids, settings, ids that end a text) to each one's new ids; the door makes it with the engine."""

Look = Callable[[Decoder, Tensor, Tensor, Batch], Tensor]
"""(decoder, hidden_TD, ids_T, micro-batch) to a number for each token, fp32 [T]."""


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
        heart: Heartbeat | None = None,
        meter: Meter | None = None,
        around: Callable[[], AbstractContextManager[None]] = nullcontext,
        lesson: Lesson | None = None,
    ) -> None:
        self.meter, self.around, self.lesson = meter, around, lesson or Lesson()
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
        self.heart = heart or Heartbeat(recipe.run.output, self.mesh)
        self.spikes = Spikes(recipe.elastic, self.position.recent)
        self.saved_at = self.position.step if position else -1
        self.stop = Stop()

    # ---------------------------------------------------------------------------------------- one step
    def step(self, batch: Batch, objective: Objective = NEXT_TOKEN) -> Step:
        """One optimizer step over all of `batch`, in micro-batches of whole sequences, each rank its share.

        The loss is the objective's sum over the batch divided by its size, whatever the split. A step whose loss or
        gradient is not finite, or a spike by `elastic.on_spike`, changes no weight, on any rank.

        Raises:
            TwofoldError: the gradient overflowed at the least loss scale.
        """
        config = self.recipe.optimizer
        lr = lr_at(self.position.step, config.lr, self.recipe.schedule)
        targets, size = int((batch.targets_T != losses.IGNORE).sum()), objective.size(batch)
        tokens = len(batch.ids_T)
        if not size:
            return Step(loss=0.0, targets=0, lr=lr, grad_norm=0.0, tokens=tokens, skipped="the batch has no target")
        self.optimizer.zero()
        self.routers.begin(self.position.step, tokens, self.scaler.scale)
        sums = self._pass(batch, size / self.scaler.scale, objective)
        self.axes.collect(self.decoder)
        self.optimizer.collect()  # what a pipeline leaves where it is
        sums = dict(zip(sums, self.mesh.sum("loss", *sums.values()), strict=True))
        work = self.meter.work(batch.lengths, targets) if self.meter else 0
        norm = self.optimizer.clip(self.scaler.scale)
        done = Step(loss=sums["loss"] / size, targets=targets, lr=lr, grad_norm=norm, tokens=tokens, flops=work)
        finite = math.isfinite(done.loss) and math.isfinite(done.grad_norm)
        spike = self.spikes.look(done.loss) if finite else None
        figures = objective.figures(sums)
        done = replace(done, figures=figures | self.routers.end(moved=finite and spike is None))
        if not finite:
            done = self._skip(done, batch)
        else:
            if spike is None:
                self.optimizer.step(lr)
            else:
                done = replace(done, skipped=f"{spike} (batch {self.position.batch})")
            self.scaler.update(None)
        self.optimizer.zero()
        return done

    def _skip(self, done: Step, batch: Batch) -> Step:
        """The step as one that changed nothing: what was not finite and where first, and the next loss scale."""
        spoiled, scale = not math.isfinite(done.loss), self.scaler.scale
        parts = self.axes.share(batch, self.recipe.data.micro_tokens)
        why = fault.explain(
            self.decoder,
            ((name, self.optimizer.gradient(name)) for name in self.optimizer.weights),
            lambda: [self._forward(part) for part in (parts if spoiled else parts[:1])],
            spoiled,
            lambda flags: self.mesh.sum("replicate", *self.mesh.sum("zero", *self.mesh.sum("tp", *flags))),
        )
        why += f" (batch {self.position.batch})"
        self.scaler.update(why)
        if self.scaler.dynamic:
            why += f", at loss scale {scale:g}, from here {self.scaler.scale:g}"
        return replace(done, skipped=why, overflow=self.scaler.dynamic and not spoiled)

    def _pass(self, batch: Batch, total: float, objective: Objective) -> Sums:
        """Forward and backward over this rank's share of a batch, of (sum / `total`); its part of the sums."""
        parts = self.axes.share(batch, self.recipe.data.micro_tokens)
        if self.axes.pipeline:
            if objective.each is None:
                raise ConfigError(f"parallel.pp cuts what {type(objective).__name__} must see whole: set pp = 1")
            placed = [self.axes.place(part) for part in parts]
            return {"loss": self.axes.pipeline.run(placed, total, self.decoder, objective.each)}
        sums: Sums = {}
        for number, part in enumerate(parts, 1):
            self.zero.micro_batch(last=number == len(parts))
            ids_T, targets_T, ctx = self.axes.place(part)
            hidden_TD = self.decoder(ids_T, ctx)
            more = objective.backward(self.decoder, hidden_TD, targets_T, part, total, self.places.spec.vocab)
            sums = {name: sums.get(name, 0.0) + value for name, value in more.items()}
            self.optimizer.collect()
        return sums

    @torch.no_grad()
    def read(self, batch: Batch, look: Look, decoder: Decoder | None = None) -> Tensor:
        """What `look` says of each token of a batch, fp32 [T], the same on every rank: each reads its share.

        `look` is given (decoder, hidden_TD, ids_T, part); `decoder` is another one than the trainer's.
        """
        out_T, decoder = torch.zeros(len(batch.ids_T)), decoder or self.decoder
        for part in self.axes.share(batch, self.recipe.data.micro_tokens):
            ids_T, _, ctx = self.axes.place(part)
            found_T = look(decoder, decoder(ids_T, ctx), ids_T, part)
            mine = len(part.ids_T) - part.padding
            out_T[part.first : part.first + mine] = found_T[:mine]
        return self.mesh.total("data", out_T)

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

    def _forward(self, part: Batch) -> object:
        """One micro-batch through all that the loss hangs on; reward models and draft heads end there."""
        if self.recipe.heads not in ("reward", "draft"):
            return self._score(part)
        ids_T, _, ctx = self.axes.place(part)
        return self.decoder(ids_T, ctx)

    # ---------------------------------------------------------------------------------------- the loop
    def fit(self) -> int:
        """Train to the last step, from wherever the run stands; 0 when done, STOPPED when asked to stop."""
        steps = self.recipe.schedule.steps
        with self.stop as stop, self.heart, self.display:
            clock = Clock()
            if self.recipe.elastic.on_spike == "rewind" and not self.position.step:
                self.saved_at = -1
                self.save()  # so that there is somewhere to go back to
            while self.position.step < steps:
                with suppress(GivenUp):  # why is told below
                    self._advance(clock)
                asked, failed = self.mesh.sum("world", float(stop.asked is not None), float(self.saver.failed))
                if failed:
                    with self.heart.apart("the checkpoint"):
                        self.saver.wait()
                if asked and self.position.step < steps:
                    with self.heart.apart("the last checkpoint"):
                        self.save()
                        self.saver.wait()
                    why = stop.asked or "another rank was told to stop"
                    done = f"saved at step {self.position.step}" if self.position.step else "no step was done yet"
                    self.display.say(f"{why}: {done}; the same command goes on from here")
                    return STOPPED
            with self.heart.apart("the last checkpoint"):
                self.save()
                self.saver.wait()
        return 0

    def _advance(self, clock: Clock) -> None:
        run, at = self.recipe.run, self.position
        self.heart.beat(at.step, "the pass")
        clock.start()
        with self.around():
            done = self.lesson.step(self)
        clock.stop(done.tokens, done.flops)
        if done.diverged and self.recipe.elastic.on_spike == "rewind":
            with self.heart.apart("the way back"):
                rewind(self, str(done.skipped))
            return
        self.position = replace(
            at,
            step=at.step + 1,
            tokens=at.tokens + done.tokens,
            skipped=at.skipped + (done.skipped is not None),
            skips_in_row=at.skips_in_row + (not done.overflow) if done.skipped else 0,
            loss=at.loss if done.skipped else done.loss,
            rewinds=at.rewinds if (at.step + 1) % run.save_every else 0,
            recent=self.spikes.state(),
        )
        step, last = self.position.step, self.position.step == self.recipe.schedule.steps
        self._report(done, clock, step % run.log_every == 0 or last)
        if step % run.eval_every == 0 or last:
            self.heart.beat(at.step, "the validation")
            self.lesson.examine(self)
            self._draw()
        if self.recipe.sample.prompts and (step % self.recipe.sample.every == 0 or last):
            with self.heart.apart("the samples"):
                self.sample()
        if step % run.save_every == 0:
            with self.heart.apart("the checkpoint"):
                self.save()
        self.optimizer.offload.settle()

    def _report(self, done: Step, clock: Clock, log: bool) -> None:
        step = self.position.step
        if done.skipped:
            figures = {name: value for name, value in done.figures.items() if math.isfinite(value)}
            self.journal.add(step, skipped=done.skipped, **figures, **self.lesson.at_fault(self))
            self.display.say(f"step {step} skipped: {done.skipped} ({self.position.skipped} so far)")
            if self.position.skips_in_row >= self.recipe.optimizer.max_skips:
                advice = "lower optimizer.lr, lengthen schedule.warmup, or train in fp32"
                if not done.targets:  # there was nothing to learn from
                    advice = "look at what the run reads, and at what judges it"
                raise TwofoldError(
                    f"{self.position.skips_in_row} steps in a row were skipped, the last (step {step}) because "
                    f"{done.skipped}: {advice}"
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
            step,
            loss=done.loss,
            lr=done.lr,
            grad_norm=done.grad_norm,
            speed=speed,
            seconds_left=left,
            more=self.lesson.line(done.figures),
            **machine,
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
        if self.saved_at == self.position.step:
            return
        self.journal.sync()
        self.zero.settle()
        dtype, places = self.zero.dtype, self.places
        self.saver.save(
            Snapshot(
                position=replace(self.position, scaler=self.scaler.state()),
                weights=weight_pieces(self.decoder, places, dtype),
                states=state_pieces(self.decoder, places, self.optimizer, self.mesh, dtype) | self.lesson.pieces(self),
            )
        )
        self.saved_at = self.position.step

    def _draw(self) -> None:
        if not self.mesh.main:
            return
        curves = {"training": self.journal.curve("loss"), "validation": self.journal.curve("valid_loss")}
        picture = plot.svg(curves, title=f"{self.recipe.run.output.name}: loss")
        (self.recipe.run.output / "loss.svg").write_text(picture, encoding="utf-8")
