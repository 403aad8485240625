"""The peer: transformers' Trainer, a rank of it, with its own loop.

    python benchmarks/peers/train_transformers.py --model DIR --threads N --length L --micro B

It is asked to write, log and show nothing. A turn ends in a callback, which waits there for the next one. Needs torch,
transformers and accelerate.
"""

from __future__ import annotations

import argparse
import tempfile
from typing import Any

from protocol import Channel
from training import CLIP, Turns, arguments, causal_model, optimizer, place, sequences, versions

STEPS = 1_000_000


def main() -> None:
    args = arguments(__doc__).parse_args()
    turns = Turns(Channel())

    import torch
    import transformers

    model = causal_model(args)
    rule = optimizer(model)
    schedule = torch.optim.lr_scheduler.LambdaLR(rule, lambda step: 1.0)
    with tempfile.TemporaryDirectory() as folder:
        settings = transformers.TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=args.micro,
            max_steps=STEPS,
            max_grad_norm=CLIP,
            use_cpu=True,
            ddp_backend="gloo",
            report_to="none",
            logging_strategy="no",
            save_strategy="no",
            disable_tqdm=True,
        )
        trainer = ordered(transformers.Trainer)(
            model=model, args=settings, train_dataset=rows_of(args), optimizers=(rule, schedule)
        )
        trainer.add_callback(asked(transformers.TrainerCallback, turns, trainer))
        trainer.train()


def rows_of(args: argparse.Namespace) -> Any:
    """Sequences by number, so that every rank's share of a step is what it is for the others."""
    import torch

    class Rows(torch.utils.data.Dataset[Any]):
        def __len__(self) -> int:
            return STEPS * place()[1] * args.micro

        def __getitem__(self, number: int) -> dict[str, Any]:
            step, row = divmod(number, place()[1] * args.micro)
            ids = sequences(args, step)[row]
            return {"input_ids": ids, "labels": ids}

    return Rows()


def ordered(base: type[Any]) -> type[Any]:
    """A Trainer that reads in order and keeps the last step's loss."""
    import torch

    class Ordered(base):  # type: ignore[misc]
        last = 0.0

        def _get_train_sampler(self, dataset: Any = None) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)

        def training_step(self, *args: Any, **more: Any) -> Any:
            loss = super().training_step(*args, **more)
            self.last = float(loss.detach())
            return loss

    return Ordered


def asked(base: type[Any], turns: Turns, trainer: Any) -> Any:
    """A callback that lets the loop go on while steps are wanted."""

    class Asked(base):  # type: ignore[misc]
        def on_train_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            turns.ready(f"Trainer, {versions('transformers', 'accelerate', 'torch')}")
            turns.wanted()

        def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            turns.done(trainer.last)
            control.should_training_stop = not turns.wanted()

    return Asked()


if __name__ == "__main__":
    main()
