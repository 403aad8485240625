"""Door: `init_inference`, with DeepSpeed's name and arguments: a transformers model in, an engine around it out.

dtype ─▶ swap, each replacement proven ─▶ the whole looked at ─▶ int8 ─▶ cut among the ranks
"""

from __future__ import annotations

import atexit
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ...core import ConfigError
from ...parallel import discover, joined
from .config import InferenceConfig, resolve
from .cut import cut, same_everywhere
from .proof import BOUNDS, apart
from .report import Report
from .swap import Swap, to_int8

_LAYERS = 8  # differences of layers add up: the whole may differ by so many times what one module may
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class InferenceEngine:
    """A model with our operations inside: calls, `generate` and attributes are the model's own.

    `other_attention` counts the calls of attention that went to the model's own, by reason.
    """

    def __init__(self, module: nn.Module, config: InferenceConfig, report: Report, swap: Swap | None) -> None:
        self.module, self.config, self.report = module, config, report
        self._swap = swap

    @property
    def other_attention(self) -> dict[str, int]:
        return dict(self._swap.look.other) if self._swap is not None else {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["module"], name)


def init_inference(
    model: nn.Module, config: str | Path | Mapping[str, Any] | None = None, **settings: Any
) -> InferenceEngine:
    """Swap a model's operations for ours in place, where they give the same, and say what became of each.

    Keywords are those of `InferenceConfig` (dtype, tensor_parallel, replace_with_kernel_inject, verify), or of
    DeepSpeed; they win over `config`. The model is put into evaluation mode. Its outputs differ by rounding alone: a
    module's by at most 2e-5 of its largest number in fp32 (2e-2 in bf16, 4e-3 in fp16), the whole by eight times
    that, and a model that comes out further away is an error. With int8 weights nothing is promised.

    Raises:
        ConfigError: a setting that is unknown or out of range, heads that the ranks cannot share, or a model that came
            out different from what it was.
    """
    given = resolve(config, settings)
    if not isinstance(model, nn.Module):
        raise ConfigError(f"init_inference takes a torch module, such as a transformers model, not {type(model)}")
    model.eval()
    if given.dtype in _DTYPES:
        model.to(_DTYPES[given.dtype])
    group = _ranks(given.tensor_parallel)
    if not given.replace_with_kernel_inject and group is None:
        return InferenceEngine(model, given, Report(), None)
    before = _answer(model) if given.verify else None
    swap = Swap(model)
    report = swap.run()
    if before is not None:
        dtype = next(model.parameters()).dtype
        report.bound = _LAYERS * BOUNDS.get(dtype, 0.0)
        after = _answer(model)
        report.difference = float("inf") if after is None else apart(after, before)
        if report.difference > report.bound:
            raise ConfigError(
                f"the model with our operations gives other outputs (a difference of {report.difference:.1e}, allowed "
                f"{report.bound:.0e}): load it anew and use it as it is, and please report its class"
            )
    if group is not None:
        same_everywhere(model, group)
        cut(model, swap.attentions, group)
    if given.dtype == "int8":
        to_int8(model)
    return InferenceEngine(model, given, report, swap)


def _ranks(degree: int) -> dist.ProcessGroup | None:
    """The ranks that share the model, this one among them; neighbours when there are several such groups.

    Raises:
        ConfigError: there are not so many processes.
    """
    if degree == 1:
        return None
    if not dist.is_initialized():
        ranks = discover()
        if ranks.world < degree:
            raise ConfigError(f"tensor_parallel is {degree}, processes are {ranks.world}: start as many with torchrun")
        stack = ExitStack()
        stack.enter_context(joined(ranks, "cuda" if torch.cuda.is_available() else "cpu"))
        atexit.register(stack.close)
    world = dist.get_world_size()
    if world % degree:
        raise ConfigError(f"tensor_parallel is {degree}, which does not divide {world} processes")
    groups = [dist.new_group(list(range(first, first + degree))) for first in range(0, world, degree)]
    mine: dist.ProcessGroup = groups[dist.get_rank() // degree]
    return mine


@torch.no_grad()
def _answer(model: nn.Module) -> Tensor | None:
    """The model's first output on two short texts of random ids, None when it takes no ids."""
    config = getattr(model, "config", None)
    vocab = getattr(config, "vocab_size", None)
    if not isinstance(vocab, int):
        return None
    device = next(model.parameters()).device
    ids = torch.randint(0, vocab, (2, 9), generator=torch.Generator().manual_seed(0)).to(device)
    try:
        out = model(ids)
    except (TypeError, ValueError):
        return None
    found = out[0] if isinstance(out, tuple) else getattr(out, "logits", getattr(out, "last_hidden_state", None))
    return found if isinstance(found, Tensor) else None
