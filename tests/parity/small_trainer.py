"""A trainer over batches of random numbers, for tests of single steps and short runs."""

from __future__ import annotations

from pathlib import Path

import torch

from twofold.data import Batch
from twofold.models.decoder import Decoder
from twofold.parallel import Mesh
from twofold.train import loss as losses
from twofold.train.checkpoint import Checkpoints
from twofold.train.config import DataConfig, ModelConfig, OptimizerConfig, Recipe, RunConfig, ScheduleConfig
from twofold.train.journal import Journal
from twofold.train.optimizer import Optimizer
from twofold.train.progress import Display
from twofold.train.saver import Saver
from twofold.train.trainer import Data, Trainer

VOCAB = 97


class Words:
    eos_ids = (1,)

    def prompt(self, text: str) -> list[int]:
        return [len(text), 2, 3]

    def text(self, ids: list[int]) -> str:
        return " ".join(map(str, ids))


class NoFiles:
    """A model that is not written."""

    def plan(self, dtype, whole, writers):
        return {}

    def finish(self, directory: Path, dtype, files) -> None:
        pass


class Numbers:
    """Batches of sequences of given lengths, some targets left out."""

    def __init__(self, lengths: tuple[int, ...], *, hide: float = 0.0, vocab: int = VOCAB) -> None:
        self.lengths, self.hide, self.vocab = lengths, hide, vocab

    def batch(self, index: int) -> Batch:
        generator = torch.Generator().manual_seed(index)
        ids = torch.randint(0, self.vocab, (sum(self.lengths),), generator=generator)
        targets = torch.randint(0, self.vocab, ids.shape, generator=generator)
        targets[torch.rand(ids.shape, generator=generator) < self.hide] = losses.IGNORE
        return Batch(ids, targets, self.lengths)


def make_trainer(
    decoder: Decoder, folder: Path, data: Numbers, *, micro: int | None = None, steps: int = 8, **more
) -> Trainer:
    optimizer = OptimizerConfig(lr=3e-3, clip=0.5, max_skips=3)
    recipe = Recipe(
        kind="pretrain",
        model=ModelConfig(from_=folder),
        data=DataConfig(train=("x",), seq_len=1, tokens_per_step=64, micro_tokens=micro),
        schedule=ScheduleConfig(steps=steps, warmup=2),
        run=RunConfig(output=folder, eval_every=4, save_every=100),
        optimizer=optimizer,
    )
    return Trainer(
        decoder,
        Optimizer(decoder.named_parameters(), optimizer),
        Data(train=data, valid=[]),
        recipe,
        saver=Saver(Checkpoints(folder / "checkpoints", 1), NoFiles(), Mesh()),
        journal=Journal(folder),
        display=Display(steps),
        words=Words(),
        **more,
    )
