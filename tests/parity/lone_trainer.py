"""A trainer of TRL's that was never set up, so that one of its methods can be called; the tensors of test_trl*.py."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

LENGTHS = (3, 7, 1, 5, 4, 2)
"""Tokens of six answers; as pairs, the first three are chosen, the others rejected."""
LONGEST = 7


def draw(*shape: int, seed: int, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


MASK_ST = torch.arange(LONGEST) < torch.tensor(LENGTHS)[:, None]
OWNER_R = MASK_ST.nonzero()[:, 0]
S = len(LENGTHS)
LOGP_ST = -draw(S, LONGEST, seed=1).abs() - 0.05
OLD_ST = (LOGP_ST + draw(S, LONGEST, seed=2, scale=0.3)).clamp(max=-0.01)
REFERENCE_ST = (LOGP_ST + draw(S, LONGEST, seed=3, scale=0.5)).clamp(max=-0.01)
ADVANTAGE_S = draw(S, seed=4)


class Alone:
    """An accelerator of one process."""

    device = torch.device("cpu")
    process_index, num_processes = 0, 1
    gather = gather_for_metrics = staticmethod(lambda x: x)
    reduce = staticmethod(lambda x, reduction: x)


def trainer(kind: type, **attributes: Any) -> Any:
    """A trainer that was never set up, with what one method reads."""
    made = object.__new__(kind)
    model = SimpleNamespace(training=True, is_gradient_checkpointing=False)
    common = {"model": model, "accelerator": Alone(), "aux_loss_enabled": False, "_tp_size": 1}
    made.__dict__.update(common, _metrics=defaultdict(lambda: defaultdict(list)), _total_train_tokens=0, **attributes)
    return made


def same(ours: Tensor, theirs: Tensor, *leaves: Tensor) -> None:
    """The same value, and the same gradient at each of the leaves that both are functions of."""
    torch.testing.assert_close(ours.detach(), theirs.detach(), rtol=2e-5, atol=1e-6)
    for leaf in leaves:
        mine, other = (torch.autograd.grad(x, leaf, retain_graph=True)[0] for x in (ours, theirs))
        assert other.abs().max() > 0
        torch.testing.assert_close(mine, other, rtol=2e-5, atol=1e-6)
