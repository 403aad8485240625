"""Fast functions, each beside its slow truth. A row's bits never depend on the rows beside it.

op.py          an op: its definition, its implementations, and which one serves it here
reader.py      what the choice of an implementation hangs on, read from a call's arguments
shapes.py      what the name of a tensor says of its shape
custom.py      kernels of your own, from C++, CUDA or Triton
entry.py       a function with a C ABI, declared so that every pointer is checked before it is passed
compiled.py    source that is built at first use and called by its entries
joined.py      a kernel from outside, joined to autograd
check.py       is an implementation its reference, over shapes, dtypes and strides
flops.py       what a call costs, from shapes, forward and backward
samples.py     arguments of a typical size for each op, to measure with
build.py       C++ into a shared library, once, in a cache of the user's own
native.py      the library of CPU kernels: for which instructions it is built here, or why it is not
stages.py      the stages that the CPU kernels know, as ctypes
cpu/           the CPU kernels, in C++
gradient.py    the gradient of a kernel by way of its definition
rows.py        matrix products by row counts that this machine gives the definition's bits for
linear.py      x Wᵀ + b
norm.py        root-mean-square and layer norm
rope.py        rotary positions
activation.py  activations, and the gated product
attention.py   the walk over blocks of keys, for whole sequences and for block tables
blocksparse.py which blocks of keys there are at all, as the kernels read it
walk.py        attention as a walk over blocks of keys, and its folds
paged.py       attention over keys and values kept in blocks
moe.py         routing and experts
slopes.py      the two products of a linear layer's backward
backward.py    gradients of norms and activations by their own kernels
loss.py        log-probabilities of given tokens, without the logits of the whole vocabulary
entropy.py     the entropy of what may come next, likewise
optimizer.py   AdamW, Adam, SGD, Lion and Adagrad over all tensors in one pass, and the norm of all gradients
sample.py      from logits to tokens, and log-probabilities of given ones
sample_native.py  the sampler's stage: choices as plain structs
lora.py        adapters: each token its own low-rank addition
slotted.py     those of a served model, in slots
grouped_stages.py  the stages of grouped products, as ctypes
grouped.py     rows dealt to groups, each by its own matrix: what experts and adapters share
quantized.py   products with int8 and int4 weights, and the panels they lie in
panels.py      products with quantized weights as stages of a program
triton/        the same ops for CUDA
"""

from . import activation, attention, linear, lora, moe, norm, quantized, rope, triton
from .op import Op, all_ops, op

__all__ = [
    "Op",
    "activation",
    "all_ops",
    "attention",
    "linear",
    "lora",
    "moe",
    "norm",
    "op",
    "quantized",
    "rope",
    "triton",
]
