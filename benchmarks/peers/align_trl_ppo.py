"""The peer: PPO of the last TRL that has it, its own loop: policy, reference, value and reward are apart.

    python benchmarks/peers/align_trl_ppo.py --model DIR --prompts FILE --threads N --rows N ...

The value model is a second network of the policy's shape, as TRL asks for. The reward "model" only counts. A prompt
comes as often as it is answered. EOS is ignored. Needs torch, transformers, trl 1.12 and datasets.
"""

from __future__ import annotations

import argparse
from typing import Any

from protocol import Channel
from rolling import (
    ALL_STEPS,
    KL_COEF,
    LAM,
    VALUE_COEF,
    Steps,
    Stopwatch,
    arguments,
    causal_model,
    rule_of,
    texts,
    trained_by,
    use_threads,
)
from training import versions


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--rows", type=int, required=True, help="answers to a pass of the trainer")
    parser.add_argument("--forward", type=int, default=64, help="answers to a call of generate and to a look at them")
    args = parser.parse_args()
    if args.ends:
        parser.error("TRL's PPO knows one end token, the benchmark's policies have many: leave --ends out")
    steps = Steps(Channel())
    use_threads(args)

    import torch
    from trl.experimental.ppo import ppo_trainer

    torch.set_num_threads(args.threads)
    trainer = make_trainer(args, ppo_trainer)
    ppo_trainer.batch_generation = rolling(ppo_trainer, steps, args)
    trainer.add_callback(paced(steps, f"{versions('trl', 'transformers', 'torch')}, {args.rows} rows a pass"))
    trainer.train()


def make_trainer(args: argparse.Namespace, trl: Any) -> Any:
    """TRL's trainer of these prompts, `trl` its module."""
    import datasets
    import torch
    import transformers

    words = transformers.AutoTokenizer.from_pretrained(args.model, padding_side="left")
    words.add_special_tokens({"pad_token": "[no token of the model]"})  # one that is drawn would be taken for padding
    rows = [{"input_ids": ids} for ids in words(texts(args))["input_ids"]] * args.group
    policy = causal_model(args.model)
    policy.generation_config = transformers.GenerationConfig()
    value = causal_model(args.model, "AutoModelForSequenceClassification", num_labels=1)
    torch.nn.init.zeros_(value.score.weight)  # as ours begins
    settings = trained_by(args, args.rows, len(rows)) | {
        "total_episodes": len(rows) * ALL_STEPS,
        "num_ppo_epochs": 1,
        "num_mini_batches": 1,
        "num_sample_generations": 0,
        "local_rollout_forward_batch_size": args.forward,
        "response_length": args.new,
        "temperature": 1.0,
        "kl_coef": KL_COEF,
        "vf_coef": VALUE_COEF,
        "lam": LAM,
    }
    trainer = trl.PPOTrainer(
        args=trl.PPOConfig(**settings),
        processing_class=words,
        model=policy,
        ref_model=causal_model(args.model),
        reward_model=counting(args.length),
        value_model=value,
        train_dataset=datasets.Dataset.from_list(rows),
        eval_dataset=datasets.Dataset.from_list(rows[:1]),
        optimizers=rule_of(policy, value),
    )
    # A step reads all prompts, and accelerate would take an optimizer step for every pass over the end of the data.
    trainer.accelerator.gradient_state.plugin_kwargs["sync_with_dataloader"] = False
    return trainer


def counting(length: int) -> Any:
    """A reward "model" whose score at a token is the share of even ids behind the prompt so far."""
    import torch
    from transformers.modeling_outputs import BaseModelOutput

    class Body(torch.nn.Module):
        def forward(self, input_ids: Any, **more: Any) -> Any:
            answers = (input_ids[:, length:] % 2 == 0).float().cumsum(1)
            share = answers / torch.arange(1, answers.shape[1] + 1)
            share = torch.nn.functional.pad(share, (length, 0))
            return BaseModelOutput(last_hidden_state=share[..., None], hidden_states=(share[..., None],))

    class Counting(torch.nn.Module):
        base_model_prefix = "body"

        def __init__(self) -> None:
            super().__init__()
            self.body, self.score = Body(), torch.nn.Identity()

    return Counting()


def rolling(trl: Any, steps: Steps, args: argparse.Namespace) -> Any:
    """What writes a step's answers, timed and told of; or takes the given ones, whose logits the policy then says."""
    import torch

    write = trl.batch_generation

    def noted(model: Any, queries: Any, *given: Any) -> Any:
        prompts, watch = queries.tolist(), Stopwatch()
        if steps.given:
            whole = torch.cat([queries, torch.tensor(steps.answers(prompts))], 1)
            parts = whole.split(args.forward)
            logits = torch.cat([model(part).logits[:, args.length - 1 : -1] for part in parts])
        else:
            whole, logits = write(model, queries, *given)
        steps.rolled(*watch.read(), prompts, whole[:, args.length :].tolist())
        return whole, logits

    return noted


def paced(steps: Steps, ready: str) -> Any:
    """A callback that lets the loop go on while steps are wanted."""
    import transformers

    class Paced(transformers.TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            steps.ready(ready)
            steps.wanted()

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **more: Any) -> None:
            steps.done(
                policy_loss=logs["loss/policy_avg"],
                value_loss=logs["loss/value_avg"],
                reward=logs["objective/scores"],
                ref_kl=logs["objective/kl"],
            )

        def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            if not steps.wanted():
                raise SystemExit

    return Paced()


if __name__ == "__main__":
    main()
