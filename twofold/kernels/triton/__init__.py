"""The ops on CUDA, in Triton: the same semantics as their references, and bits that the batch does not touch.

available.py   whether Triton can serve this machine's accelerator
register.py    which ops it serves, and their gradients; imports no kernel until the first call
tiles.py       which tile a product runs in, and which tiles were seen to be alike
product.py     the matrix product behind linear layers and experts, plain and from panels of int8 and int4 codes
linear.py      linear layers
quantize.py    activations as int8 codes, and rows of a quantized table
norm.py        norms, with the residual added on the way
activation.py  activations and the gated product
rope.py        rotary positions, alone or on the way into the KV cache
attention.py   attention over a paged cache or whole sequences, decode split by position
experts.py     routing and experts
sampling.py    a token from logits, without a sort
"""

from . import register
from .available import SPAN, missing

__all__ = ["SPAN", "missing", "register"]
