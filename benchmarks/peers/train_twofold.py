"""Twofold's trainer, a rank of it: the step of `twofold train`, on the token ids that its peers read.

    python benchmarks/peers/train_twofold.py --model DIR --threads N --length L --micro B [--zero 0..3] [--disk WHAT]

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
    parser.add_argument("--disk", nargs="*", default=[], help="what waits in mapped files: optimizer, gradients ...")
    args = parser.parse_args()
    turns = Turns(Channel())
    os.environ["OMP_NUM_THREADS"] = str(args.threads)

    from twofold.platforms import bound_spin, keep_freed

    bound_spin()

    import torch

    from twofold.parallel.ranks import discover, joined

    torch.set_num_threads(args.threads)
    keep_freed()
    ranks = discover()
    with tempfile.TemporaryDirectory() as folder, joined(ranks):
        trainer = make_trainer(args, ranks, Path(folder))
        on_disk = f", on disk {' and '.join(args.disk)}" if args.disk else ""
        turns.ready(f"twofold, fp32, {trainer.mesh.layout}{on_disk}")
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
    """The trainer of a recipe with this model, over these ranks; it will not be asked to save or sample."""
    from twofold.parallel import Mesh, ParallelConfig
    from twofold.parallel.layout import lay_out
    from twofold.train import Trainer, build
    from twofold.train import config as tables
    from twofold.train.axes import Axes
    from twofold.train.journal import Unwritten
    from twofold.train.offload_config import OffloadConfig
    from twofold.train.progress import Display
    from twofold.train.trainer import Data

    tokens = args.micro * args.length
    recipe = tables.Recipe(
        kind="pretrain",
        model=tables.ModelConfig(from_=Path(args.model)),
        data=tables.DataConfig(
            train=("-",), seq_len=args.length, tokens_per_step=tokens * ranks.world, micro_tokens=tokens
        ),
        schedule=tables.ScheduleConfig(steps=1_000_000, kind="constant"),
        run=tables.RunConfig(output=folder, threads=args.threads),
        parallel=ParallelConfig(zero=args.zero),
        offload=OffloadConfig(**dict.fromkeys(args.disk, "disk")),
    )
    given = {name: value for name, value in recipe.optimizer.numbers().items() if value is not None}
    numbers = {"lr": recipe.optimizer.lr, **given, "clip": recipe.optimizer.clip}
    assert numbers == {**RULE, "weight_decay": DECAY, "clip": CLIP}, "peers would train by another rule"
    mesh = Mesh(lay_out(recipe.parallel, ranks.world), ranks.rank)
    axes, offload = Axes(mesh, recipe.parallel), build.build_offload(recipe, mesh)
    decoder, zero, places = build.build_model(recipe, None, axes, offload)
    return Trainer(
        decoder,
        build.build_optimizer(decoder, recipe, axes, offload),
        Data(train=None, valid=[]),
        recipe,
        saver=None,
        journal=Unwritten(),
        display=Display(1),
        words=None,
        axes=axes,
        zero=zero,
        places=places,
    )


if __name__ == "__main__":
    main()
