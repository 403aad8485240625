"""Answers whose advantage is 0 are not read again: what is learned is the same."""

from __future__ import annotations

import pytest
import torch
from tiny import SPECS, decoder

from twofold.align.episode import Prompt, Rollout
from twofold.align.experience import pack
from twofold.align.grpo import GroupLoss
from twofold.align.policy_config import GrpoConfig
from twofold.align.update import own_tokens, teaching
from twofold.models.packed import PackedContext


def rolled(mine: str) -> Rollout:
    """A rollout behind a prompt of two ids, whose tokens are the model's where `mine` says "m"."""
    size = len(mine)
    return Rollout(
        prompt=Prompt(number=0, ids=(100, 101)),
        sample=0,
        ids=tuple(range(size)),
        logprobs=(-1.0,) * size,
        mine=tuple(who == "m" for who in mine),
        versions=(1,) * size,
        finish="stop",
        text="",
    )


def test_answers_that_teach_nothing_are_left_out_and_counted() -> None:
    """The same loss, and the same gradient to the last bits, as with every answer read."""
    spec = SPECS["llama"]
    rollouts = [rolled(mine) for mine in ("mmm", "mm", "mmtm", "m")]
    batch = pack(rollouts, {"advantage": torch.tensor([0.5, 0.0, -1.0, 0.0])})
    few = teaching(batch)
    assert few.lengths == (4, 5) and len(few.ids_T) == 9
    found = []
    for part, counted in ((batch, None), (few, own_tokens(batch))):
        torch.manual_seed(0)
        model = decoder(spec)
        objective = GroupLoss(GrpoConfig(variant="dapo"), 8)
        objective.counted = counted
        total = objective.size(part)
        hidden_TD = model(part.ids_T, PackedContext(part.lengths))
        sums = objective.backward(model, hidden_TD, part.targets_T, part, total, spec.vocab)
        found.append((total, sums["loss"], [p.grad.clone() for p in model.parameters()]))
    (one, loss, grads), (two, other, others) = found
    assert one == two == 9.0 and loss == pytest.approx(other, rel=1e-6)
    for a, b in zip(grads, others, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
