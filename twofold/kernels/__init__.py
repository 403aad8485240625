"""Fast functions, each beside its slow truth. A row's bits never depend on the rows beside it.

op.py          an op: its definition, its implementations, and which one serves it here
rows.py        matrix products by row counts that this machine gives the definition's bits for
linear.py      x Wᵀ + b
norm.py        root-mean-square and layer norm
rope.py        rotary positions
activation.py  activations, and the gated product
attention.py   the walk over blocks of keys, for whole sequences and for block tables
moe.py         routing and experts
lora.py        adapters: each token its own low-rank addition
grouped.py     rows dealt to groups, each by its own matrix: what experts and adapters share
quantized.py   products with int8 and int4 weights, and the panels they lie in
"""

from . import activation, attention, linear, lora, moe, norm, quantized, rope
from .op import Op, all_ops, op

__all__ = ["Op", "activation", "all_ops", "attention", "linear", "lora", "moe", "norm", "op", "quantized", "rope"]
