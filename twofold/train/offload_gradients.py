"""Gradients that leave as soon as the backward pass has them, and are summed where they are kept.

    layer 3 ─▶ w3.grad ─▶ queue ─▶ thread: sum += grad, let go
    layer 2 ─▶ w2.grad ─▶ ...                                    the backward pass goes on meanwhile

Each weight's gradients are added in the order in which autograd has them, so sums have the bits of sums in memory.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

import numpy as np
import torch
from torch import Tensor

from ..platforms.host import HostPool


class KeptGradients:
    """The fp32 gradients of some weights in a pool; at most `limit` bytes of them, or one, are on their way there.

    `local` gives this rank's slice of a weight or of a gradient.
    """

    def __init__(
        self, weights: Mapping[str, Tensor], pool: HostPool, local: Callable[[Tensor], Tensor], *, limit: int
    ) -> None:
        pool.allocate({f"grad.{name}": (tuple(local(it).shape), torch.float32) for name, it in weights.items()})
        self._weights, self._pool, self._local, self._limit = dict(weights), pool, local, limit
        self._seen: set[str] = set()
        self._going: deque[tuple[Future[None], int]] = deque()
        self._writer = ThreadPoolExecutor(1, "gradients")
        for name, weight in weights.items():
            weight.register_post_accumulate_grad_hook(partial(self._hook, name))

    def get(self, name: str) -> Tensor | None:
        """The sum of this step, once all that is on its way has come; None when there was nothing."""
        while self._going:
            self._going.popleft()[0].result()
        return self._pool[f"grad.{name}"] if name in self._seen else None

    def collect(self) -> None:
        """Take what lies at the weights: after each micro-batch, for those whose hooks nobody calls."""
        for name, weight in self._weights.items():
            self._hook(name, weight)

    def zero(self) -> None:
        """Begin new sums."""
        self.collect()
        self._seen.clear()

    def _hook(self, name: str, weight: Tensor) -> None:
        if weight.grad is not None:
            grad, weight.grad = self._local(weight.grad), None
            self._take(name, grad)

    def _take(self, name: str, grad: Tensor) -> None:
        into, fresh = self._pool[f"grad.{name}"], name not in self._seen
        self._seen.add(name)
        grad = grad.to(device="cpu", dtype=torch.float32).contiguous()
        while self._going and sum(size for _, size in self._going) + grad.nbytes > self._limit:
            self._going.popleft()[0].result()
        self._going.append((self._writer.submit(self._add, into, grad, fresh), grad.nbytes))

    def _add(self, into: Tensor, grad: Tensor, fresh: bool) -> None:
        # numpy's arithmetic, so that this thread starts no team of threads of its own
        if fresh:
            np.copyto(into.numpy(), grad.numpy())
        else:
            np.add(into.numpy(), grad.numpy(), out=into.numpy())
        self._pool.let_go(into)
