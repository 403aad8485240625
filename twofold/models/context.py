"""AttnContext: the one thing the decoder asks of the world around it, passed as an argument and never a global.

The decoder sees tokens as one flat axis T. Which of them belong together, and where older keys and values are kept,
is the context's business: `packed.py` holds whole sequences (training, scoring), `engine/paged.py` holds block tables
(serving).

Shapes: T tokens, H query heads, K key-value heads, D head size.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from ..kernels.attention import Attend


class AttnContext(Protocol):
    """Where each token stands and what it may look at."""

    @property
    def positions_T(self) -> Tensor:
        """The absolute position of each token in its own sequence, int64 [T]."""
        ...

    def attend(self, layer: int, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, how: Attend) -> Tensor:
        """Keep this layer's new keys and values; each query looks at its own past, itself included: [T, H, D]."""
        ...
