"""Twofold's trainer, a rank of it: the step of `twofold train`, on the token ids that its peers read.

    python benchmarks/peers/train_twofold.py --model DIR --threads N --length L --micro B [--zero 0..3]

What the recipe does not say here is at its default.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path
from typing import Any

from protocol import Channel
from training import CLIP, DECAY, RULE, Turns, arguments, sequences


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--zero", type=int, default=0, choices=range(4))
    args = parser.parse_args()
    turns = Turns(Channel())
    os.environ["OMP_NUM_THREADS"] = str(args.threads)

    from twofold.platforms import bound_spin

    bound_spin()

    import torch

    from twofold.parallel.ranks import discover, joined

    torch.set_num_threads(args.threads)
    ranks = discover()
    with tempfile.TemporaryDirectory() as folder, joined(ranks):
        trainer = make_trainer(args, ranks, Path(folder))
        turns.ready(f"twofold, fp32, {trainer.mesh.layout}")
        while turns.wanted():
            turns.done(trainer.step(batch(args, turns.step)).loss)


def batch(args: argparse.Namespace, step: int) -> Any:
    """All ranks' sequences end to end; transformers learns nothing from a sequence's last token, so neither do we."""
    from twofold.data import Batch
    from twofold.train.loss import IGNORE

    ids = sequences(args, step)
    targets = ids.roll(-1, 1)
    targets[:, -1] = IGNORE
    return Batch(ids_T=ids.flatten(), targets_T=targets.flatten(), lengths=(args.length,) * len(ids))


def make_trainer(args: argparse.Namespace, ranks: Any, folder: Path) -> Any:
    """The trainer of a recipe with this model, over these ranks."""
    from twofold.parallel import Mesh, ParallelConfig
    from twofold.parallel.layout import lay_out
    from twofold.train import Trainer
    from twofold.train import config as tables
    from twofold.train.axes import Axes
    from twofold.train.build import build_model, build_optimizer
    from twofold.train.checkpoint import Checkpoints
    from twofold.train.journal import Journal
    from twofold.train.progress import Display
    from twofold.train.trainer import Data
    from twofold.train.zero import Zero

    tokens = args.micro * args.length
    recipe = tables.Recipe(
        kind="pretrain",
        model=tables.ModelConfig(from_=Path(args.model)),
        data=tables.DataConfig(
            train=("-",), seq_len=args.length, tokens_per_step=tokens * ranks.world, micro_tokens=tokens
        ),
        schedule=tables.ScheduleConfig(steps=1_000_000, kind="constant"),
        run=tables.RunConfig(output=folder, threads=args.threads),
    )
    numbers = {"lr": recipe.optimizer.lr, **recipe.optimizer.numbers(), "clip": recipe.optimizer.clip}
    assert numbers == {**RULE, "weight_decay": DECAY, "clip": CLIP}, "peers would train by another rule"
    parallel = ParallelConfig(zero=args.zero)
    mesh = Mesh(lay_out(parallel, ranks.world), ranks.rank)
    axes = Axes(mesh, parallel)
    decoder = build_model(recipe, None)
    zero = Zero(decoder, mesh)
    return Trainer(
        decoder,
        build_optimizer(decoder, recipe, axes),
        Data(train=None, valid=[]),
        recipe,
        checkpoints=Checkpoints(folder / "checkpoints", 1),
        journal=Journal(folder),
        display=Display(1),
        write_model=lambda directory: None,
        words=None,
        axes=axes,
        zero=zero,
    )


if __name__ == "__main__":
    main()
