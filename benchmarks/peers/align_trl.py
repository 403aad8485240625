"""The peer: TRL's GRPO with transformers' generation, its own loop.

    python benchmarks/peers/align_trl.py --model DIR --prompts FILE --threads N --rows N ...

All answers of a step are written in one call and learned from in one optimizer step, `--rows` of them to a pass. A
step begins and ends in a callback, which waits there for the next one. Needs torch, transformers, trl and datasets.
"""

from __future__ import annotations

import argparse
from typing import Any

from protocol import Channel
from rolling import ALL_STEPS, Steps, Stopwatch, arguments, causal_model, even, rule_of, texts, trained_by, use_threads
from training import versions


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--rows", type=int, required=True, help="answers to a pass of the trainer")
    args = parser.parse_args()
    steps = Steps(Channel())
    use_threads(args)

    import torch

    torch.set_num_threads(args.threads)
    trainer = make_trainer(args, steps)
    trainer.add_callback(paced(steps, f"{versions('trl', 'transformers', 'torch')}, {args.rows} rows a pass"))
    trainer.train()


def make_trainer(args: argparse.Namespace, steps: Steps) -> Any:
    """TRL's trainer of these prompts."""
    import datasets
    import transformers
    import trl

    prompts, model = texts(args), causal_model(args.model)
    settings: dict[str, Any] = trained_by(args, args.rows, len(prompts) * args.group) | {
        "num_generations": args.group,
        "max_completion_length": args.new,
        "max_steps": ALL_STEPS,
        "loss_type": "grpo",
        "beta": 0.0,
        "temperature": 1.0,
        "top_k": 0,
        "top_p": 1.0,
        "shuffle_dataset": False,
    }
    trainer = rolling(trl.GRPOTrainer, steps)(
        model=model,
        reward_funcs=even,
        args=trl.GRPOConfig(**settings),
        train_dataset=datasets.Dataset.from_list([{"prompt": text} for text in prompts]),
        processing_class=transformers.AutoTokenizer.from_pretrained(args.model, padding_side="left"),
        optimizers=rule_of(model),
    )
    if not args.ends:
        trainer.eos_token_ids = []
        trainer.generation_kwargs["eos_token_id"] = None
        trainer.generation_config.eos_token_id = model.generation_config.eos_token_id = None
    return trainer


def rolling(base: type[Any], steps: Steps) -> type[Any]:
    """A trainer that tells of its rollouts, timed where they are ids on both sides, or takes the given ones."""

    class Rolling(base):  # type: ignore[misc]
        def _generate_single_turn(self, prompt_ids: Any, *given: Any, **more: Any) -> Any:
            watch = Stopwatch()
            if steps.given:
                found: Any = (steps.answers(prompt_ids), None)
            else:
                found = super()._generate_single_turn(prompt_ids, *given, **more)
            steps.rolled(*watch.read(), prompt_ids, found[0])
            return found

    return Rolling


def paced(steps: Steps, ready: str) -> Any:
    """A callback that lets the loop go on while steps are wanted."""
    import transformers

    class Paced(transformers.TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            steps.ready(ready)

        def on_step_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            if not steps.wanted():
                raise SystemExit

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **more: Any) -> None:
            if "grad_norm" in logs:
                steps.done(loss=logs["loss"], grad_norm=logs["grad_norm"], reward=logs["reward"])

    return Paced()


if __name__ == "__main__":
    main()
