"""Prints one digest of everything that the sampler's and the trainer's kernels compute on fixed inputs.

`tests/parity/test_same_bits.py` runs it once for each instruction set and compares.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from twofold.kernels import native
from twofold.kernels.activation import ACTIVATIONS, activate, gated
from twofold.kernels.loss import Shape, _Pieces, logprobs_of
from twofold.kernels.norm import layer_norm, rms_norm
from twofold.kernels.sample import Choice, choose, score


def numbers(*shape: int, seed: int = 0) -> Tensor:
    """Whole numbers over 997, so that no library's random generator or division counts."""
    count = int(torch.tensor(shape).prod())
    mixed = (torch.arange(count) * 7919 + seed * 104729) % 1993 - 996
    return (mixed.float() / 256).view(shape)


def said() -> list[object]:
    """Every result, as something whose repr is exact."""
    out: list[object] = []
    for vocab in (17, 1025, 5003):
        logits = numbers(6, vocab, seed=vocab)
        choices = [
            Choice(temperature=0.0, report="raw", tops=5),
            Choice(temperature=0.7, u=0.3, report="processed", tops=5),
            Choice(u=0.9, top_k=9, report="processed", tops=20),
            Choice(u=0.2, top_p=0.8, report="raw"),
            Choice(u=0.5, min_p=0.02, top_p=0.99, top_k=400, report="processed", tops=3),
            Choice(u=0.8, repetition=1.3, frequency=0.4, seen=(1, 3, 3), counted=(5, 5, 7), report="processed"),
        ]
        out += [choose(logits, choices), score(logits, [3] * 6, 2)]
        out.append(logprobs_of(logits, torch.arange(6)).tolist())
        hidden, w, bias = numbers(6, 40, seed=1), numbers(vocab, 40, seed=2) / 8, numbers(vocab, seed=3)
        for shape in (Shape(0.0, 0.0), Shape(0.5, 4.0)):
            pieces = _Pieces(hidden, w, bias, torch.arange(6), shape)
            out.append(pieces.forward(keep=False).tolist())
            out += [d.tolist() for _, _, d in pieces.gradients(numbers(6, seed=9))]
    x, w, b = (numbers(*shape, seed=5).requires_grad_() for shape in ((70, 54), (54,), (54,)))
    results = [rms_norm(x, w, 1e-5), layer_norm(x, w, b, 1e-5)]
    results += [op(x, act) for act in ACTIVATIONS for op in (activate, gated)]
    for result in results:
        slopes = torch.autograd.grad(result, (x, w, b), numbers(*result.shape, seed=6), allow_unused=True)
        out += [result.tolist(), [None if slope is None else slope.tolist() for slope in slopes]]
    return out


if __name__ == "__main__":
    found = native.library()
    print(found.isa if found else native.missing(), hashlib.sha256(repr(said()).encode()).hexdigest())
