"""Twofold's alignment: the run of `twofold align`, launch, loop and all, on the prompts that its peers answer.

    python benchmarks/peers/align_twofold.py --model DIR --prompts FILE --threads N --algorithm grpo|ppo ...

A recipe is written and run. What it does not say is at its default. Steps wait for their turn inside of the lesson.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from protocol import Channel
from rolling import ALL_STEPS, CLIP, KL_COEF, LAM, RULE, VALUE_COEF, Steps, Stopwatch, arguments, texts, use_threads

ALGORITHM = {
    "grpo": "[grpo]\ngroup = {group}",
    "ppo": f"[ppo]\nepochs = 1\nvalue_coef = {VALUE_COEF}\nkl_coef = {KL_COEF}\nlam = {LAM}",
}
RECIPE = """
algorithm = "{args.algorithm}"
kind = "pretrain"
[model]
from = "{args.model}"
[data]
train = ["{prompts}"]
valid_fraction = 0.0
prompts_per_step = {count}
max_prompt = {args.length}
seq_len = {seq_len}
{micro}
[rollout]
max_tokens = {args.new}
ignore_eos = {ignore}
[[rewards]]
kind = "function"
path = "{reward}:even"
[optimizer]
lr = {rule[lr]}
betas = [{rule[betas][0]}, {rule[betas][1]}]
eps = {rule[eps]}
weight_decay = 0.0
clip = {clip}
[schedule]
steps = {steps}
kind = "constant"
[run]
output = "{args.output}"
threads = {args.threads}
eval_every = {steps}
save_every = {steps}
{table}
"""


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--algorithm", choices=ALGORITHM, required=True)
    parser.add_argument("--micro", type=int, help="tokens to a pass of the trainer (default: all of a step)")
    args = parser.parse_args()
    steps = Steps(Channel())
    use_threads(args)

    from twofold.platforms import bound_spin

    bound_spin()

    from rich.console import Console

    from twofold.align.launch import Alignment
    from twofold.train import launch

    class Asked(Alignment):
        def lesson(self, *given: Any) -> Any:
            return Paced(super().lesson(*given), steps, f"twofold align, fp32, {args.algorithm}")

    launch.run(write_recipe(args), console=Console(quiet=True), course=Asked())


def write_recipe(args: argparse.Namespace) -> Path:
    """The recipe of this run. PPO, which answers a prompt once, reads each as often as the others answer it."""
    count, prompts = len(texts(args)), args.model / args.prompts
    if args.algorithm == "ppo":
        count, rows = count * args.group, prompts.read_text() * args.group
        prompts = args.output / "prompts.jsonl"
        prompts.write_text(rows)
    recipe = Path(args.output) / "recipe.toml"
    text = RECIPE.format(
        args=args,
        prompts=prompts,
        count=count,
        seq_len=args.length + args.new,
        micro=f"micro_tokens = {args.micro}" if args.micro else "",
        ignore="false" if args.ends else "true",
        reward=Path(__file__).resolve().with_name("rolling.py"),
        rule=RULE,
        clip=CLIP,
        steps=ALL_STEPS,
        table=ALGORITHM[args.algorithm].format(group=args.group),
    )
    recipe.write_text(text)
    return recipe


class Paced:
    """A lesson whose steps wait until they are asked for, and whose rollouts are told of."""

    def __init__(self, lesson: Any, steps: Steps, name: str) -> None:
        self._lesson, self._steps, self._name = lesson, steps, name
        self._harvest = lesson.play.harvest
        lesson.play.harvest = self._noted

    def __getattr__(self, name: str) -> Any:
        return getattr(self._lesson, name)

    def step(self, trainer: Any) -> Any:
        if self._name:
            self._steps.ready(self._name)
            self._name = ""
        if not self._steps.wanted():
            raise SystemExit
        done = self._lesson.step(trainer)
        figures = {name: value for name, value in done.figures.items() if not name.startswith("seconds")}
        self._steps.done(loss=done.loss, grad_norm=done.grad_norm, **figures)
        return done

    def _noted(self, *given: Any) -> Any:
        watch = Stopwatch()
        found = self._harvest(*given)
        processor = watch.read()[1]  # rewards are given in another process
        prompts = [it.prompt.ids for it in found.rollouts]
        self._steps.rolled(found.seconds["rollout"], processor, prompts, [it.ids for it in found.rollouts])
        return found


if __name__ == "__main__":
    main()
