"""Random calls of every op that has a CPU kernel, through the Python API: sizes of 0, 1, odd and huge, rows apart from
their neighbours, buffers that end where their allocation ends, numbers that are not finite.

    python -m tests.parity.fuzz_kernels 40               40 calls of each; prints each op's digest of its results
    python -m tests.parity.fuzz_kernels 40 --sanitized   the same on a library built with sanitizers, which watch

FUZZ_THREADS is how many threads the kernels have, 3 when not set. A sanitizer must be in the process before Python
(LD_PRELOAD); `test_sanitizers.py` does that. Two machines, instruction sets or numbers of threads are alike when their
digests are.

Shapes: T tokens, K inputs, N outputs, D hidden, F feed-forward width, E experts, H heads, V vocabulary.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import itertools
import os
import re
import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from tests.parity import tiny
from tests.parity.draw import LARGEST, Draw
from twofold.kernels import native, panels
from twofold.kernels.activation import ACTIVATIONS, activate, gated, soft_cap
from twofold.kernels.attention import packed_attention
from twofold.kernels.grouped import run
from twofold.kernels.linear import linear, product, stage_of
from twofold.kernels.lora import Adapter, lora
from twofold.kernels.loss import logprobs_of, token_logprobs
from twofold.kernels.moe import experts, open_gate, route
from twofold.kernels.norm import layer_norm, rms_norm
from twofold.kernels.op import Op, all_ops
from twofold.kernels.optimizer import Shard, adagrad, adam, adamw, lion, sgd, square_sums
from twofold.kernels.paged import Panels, Spans, keep, paged_attention
from twofold.kernels.quantized import quantized_experts, quantized_linear, quantized_rows
from twofold.kernels.rope import rotate
from twofold.kernels.sample import Choice, choose, score
from twofold.kernels.slopes import tiled
from twofold.kernels.walk import Attend

SANITIZE = (
    "-fsanitize=address,undefined,float-cast-overflow",
    "-fno-sanitize-recover=all",
    "-fno-omit-frame-pointer",
    "-g",
    "-Og",  # compiles in half the time of -O1
    "-fno-var-tracking",
)
FLOATS = (torch.float32, torch.bfloat16)
Case = Callable[[Draw], Iterable[Any]]
CASES: dict[str, tuple[tuple[Op[..., Any], ...], Case]] = {}


def case(*ops: Op[..., Any]) -> Callable[[Case], Case]:
    """Decorator: a function that calls these ops once with what it draws, and gives their results."""

    def add(function: Case) -> Case:
        CASES[function.__name__] = (ops, function)
        return function

    return add


def backward(run: Callable[..., Tensor], *inputs: Tensor) -> Iterable[Any]:
    """Run the gradient's kernels too; they need not have the same bits everywhere, so little is told of them."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = run(*leaves)
    for grad in torch.autograd.grad(out, leaves, torch.ones_like(out)):
        yield tuple(grad.shape), grad.dtype


# ------------------------------------------------------------------------------------------------------- products
@case(linear)
def products(draw: Draw) -> Iterable[Any]:
    K = draw.choice((300, 700)) if draw.maybe(0.1) else draw.size()
    N = min(draw.choice((1000, 4099)) if draw.maybe(0.1) else draw.size(least=1), LARGEST // max(1, K))
    x, w = draw.floats(draw.rows(K), K, wild=True), draw.floats(N, K, dtype=draw.choice(FLOATS))
    bias = draw.floats(N, dtype=draw.choice(FLOATS)) if draw.maybe() else None
    yield linear(x, w, bias)
    if N % 2 == 0:
        yield product(x, w, bias, act=draw.choice(list(ACTIVATIONS)), gated=True)
    if len(x):
        grad = draw.floats(min(len(x), LARGEST // N), N)
        yield tiled(grad, w)
        yield tiled(grad, x[: len(grad)], w.float().clone(), standing=True, add=True)


@case(quantized_linear, quantized_rows)
def quantized_products(draw: Draw) -> Iterable[Any]:
    K, N = draw.size(least=1), draw.size(least=1)
    x, w = draw.floats(draw.rows(K), K, wild=True), draw.packed(N, K)
    yield quantized_linear(x, w, draw.floats(N) if draw.maybe() else None)
    if N % 2 == 0:
        yield panels.product(x, w, act=draw.choice(list(ACTIVATIONS)), gated=True)
    yield quantized_rows(draw.integers(0, N, draw.size()), w)
    order = torch.tensor(draw.sample(range(K), K), dtype=torch.int32)
    rows, turned = ctypes.c_int32(len(x)), torch.empty(len(x), K)
    run(panels.reorder_stage(x, order, turned, ctypes.addressof(rows)))
    yield turned


@case()
def weights_rounded(draw: Draw) -> Iterable[Any]:
    """Float weights into panels, as they are loaded."""
    shape = (*((3,) if draw.maybe(0.2) else ()), draw.size(least=1), draw.size(least=1))
    into = draw.packed(*shape)
    w = draw.floats(*shape, dtype=draw.choice((*FLOATS, torch.float16)), wild=True)
    assert panels.can_round(w, into)
    good = panels.round_into(w, into)
    yield from (good, into.codes, into.scales, into.zeros) if good else (good,)


@case()
def inputs_reordered(draw: Draw) -> Iterable[Any]:
    """Each row's numbers in the order of a weight's groups."""
    width = draw.size(least=1)
    x = draw.floats(draw.rows(width), width, wild=True)
    order = torch.tensor(draw.sample(range(width), width), dtype=torch.int32)
    out, count = torch.empty(len(x), width), ctypes.c_int32(len(x))
    run(panels.reorder_stage(x, order, out, ctypes.addressof(count)))
    assert torch.equal(out.nan_to_num(), x[:, order.long()].nan_to_num())
    yield out


@case(lora)
def adapters(draw: Draw) -> Iterable[Any]:
    K, N = draw.size(least=1), draw.size(least=1)
    T, ranks = draw.rows(K), [draw.size(64, 1) for _ in range(draw.randrange(1, 6))]
    made = [
        Adapter(
            draw.floats(rank, K, dtype=draw.choice(FLOATS)), draw.floats(N, rank, dtype=draw.choice(FLOATS)), 1 / rank
        )
        for rank in ranks
    ]
    x, y = draw.floats(T, K, wild=True), draw.floats(min(T, LARGEST // N), N)
    yield lora(x[: len(y)], y, made, draw.integers(-1, len(made), len(y)))


@case(route, experts, quantized_experts, open_gate)
def mixtures(draw: Draw) -> Iterable[Any]:
    E, D, F = draw.choice((1, 2, 7, 16, 33)), draw.size(100, 1), draw.size(64, 1)
    top_k, T = draw.randint(1, min(E, 8)), min(draw.rows(D), 700)
    logits, x = draw.floats(T, E, wild=True), draw.floats(T, D, wild=True)
    weights, chosen = route(logits, top_k, draw.maybe(), draw.floats(E) if draw.maybe(0.3) else None)
    yield from (weights, chosen)
    if draw.maybe(0.3):
        chosen = torch.where(chosen % 3 == 1, -1, chosen)  # dropped
    dtype, act = draw.choice(FLOATS), draw.choice(list(ACTIVATIONS))
    yield experts(x, draw.floats(E, 2 * F, D, dtype=dtype), draw.floats(E, D, F, dtype=dtype), weights, chosen, act)
    yield quantized_experts(x, draw.packed(E, 2 * F, D), draw.packed(E, D, F), weights, chosen, act)
    yield open_gate(x, draw.floats(T, D), draw.floats(T, 1, wild=True))


# ----------------------------------------------------------------------------------------------------------- rows
@case(rms_norm, layer_norm, activate, gated, soft_cap)
def rows(draw: Draw) -> Iterable[Any]:
    D = draw.choice((5000, 20_001)) if draw.maybe(0.1) else draw.size(least=1)
    x = draw.floats(draw.rows(D), D, wild=True)
    w, b = (draw.floats(D, dtype=draw.choice(FLOATS)) if draw.maybe() else None for _ in range(2))
    leaves = [part.requires_grad_() for part in (x, w, b) if part is not None]
    made = [rms_norm(x, w, 1e-6, draw.maybe()), layer_norm(x, w, b, 1e-5)]
    made += [activate(x, act) for act in ACTIVATIONS]
    if D % 2 == 0:
        made.append(gated(x, draw.choice(list(ACTIVATIONS))))
    for y in made:
        yield y
        slopes = torch.autograd.grad(y, leaves, draw.floats(*y.shape), allow_unused=True)
        yield from (slope for slope in slopes if slope is not None)
    yield soft_cap(x.detach(), 30.0)


# ------------------------------------------------------------------------------------------------------ attention
@case(keep, paged_attention)
def looking_back(draw: Draw) -> Iterable[Any]:
    size, heads, group = draw.choice((16, 48, 128)), draw.choice((1, 2, 3)), draw.choice((1, 2, 5))
    dim = draw.choice((1, 4, 12, 20, 64, 80, 129))
    lengths = [
        (draw.choice((0, 0, 1, 100, 300)), draw.choice((0, 1, 1, 5, 33, 140))) for _ in range(draw.randint(1, 5))
    ]
    blocks = list(range(sum(-(-(start + count) // size) for start, count in lengths) + 1))
    draw.shuffle(blocks)
    spans = Spans([(s, c, [blocks.pop() for _ in range(-(-(s + c) // size))]) for s, c in lengths], size)
    kept = len(blocks) + sum(len(own) for *_, own in spans.spans)
    cache = Panels.zeros(kept, heads, size, dim, draw.choice((torch.float32, torch.bfloat16, torch.int8)))
    past = Spans([(0, start, own) for start, _, own in spans.spans], size)
    for step in (past, spans):
        keep(draw.floats(step.tokens, heads, dim), draw.floats(step.tokens, heads, dim), cache, step)
    all_heads = heads * group
    how = Attend(
        dim**-0.5,
        window=draw.choice((None, 1, 37, 200)),
        softcap=draw.choice((None, 4.0)),
        slopes=tuple(2.0**-i for i in range(all_heads)) if draw.maybe(0.3) else None,
        sparse=draw.layout(all_heads, max(start + count for start, count, _ in spans.spans)),
    )
    sinks = draw.floats(all_heads) if draw.maybe(0.3) else None
    logsums = torch.empty(spans.tokens, all_heads)
    yield paged_attention(draw.floats(spans.tokens, all_heads, dim), cache, spans, how, sinks, logsums)
    yield logsums


@case(packed_attention, rotate)
def whole_sequences(draw: Draw) -> Iterable[Any]:
    """Forward and backward, as a trainer has them."""
    heads, group, dim = draw.choice((1, 2, 3)), draw.choice((1, 2, 5)), draw.choice((1, 4, 12, 20, 64, 80, 129))
    lengths = [draw.choice((0, 1, 5, 33, 128, 140, 300)) for _ in range(draw.randint(1, 3))]
    tokens, all_heads = sum(lengths), heads * group
    how = Attend(
        dim**-0.5,
        window=draw.choice((None, 1, 37, 200)),
        softcap=draw.choice((None, 4.0)),
        slopes=tuple(2.0**-i for i in range(all_heads)) if draw.maybe(0.3) else None,
        kept=draw.choice((None, torch.bfloat16, torch.int8)),
        sparse=draw.layout(all_heads, max(lengths)),
    )
    q, k, v = (draw.floats(tokens, count, dim).requires_grad_() for count in (all_heads, heads, heads))
    pairs = draw.randint(0, dim // 2)
    angles = draw.floats(tokens, pairs)
    turned = rotate(q, torch.cos(angles), torch.sin(angles), draw.maybe())
    out = packed_attention(turned, k, v, lengths, how)
    yield from (turned, out, *torch.autograd.grad(out, (q, k, v), draw.floats(tokens, all_heads, dim)))


# --------------------------------------------------------------------------------------------------------- tokens
@case(choose, score)
def tokens(draw: Draw) -> Iterable[Any]:
    R, V = draw.size(33), draw.choice((1, 2, 17, 255, 256, 1000, 5003))
    logits = draw.floats(R, V, wild=True)

    def ids(most: int) -> list[int]:
        return draw.sample(range(V), min(V, draw.randrange(most)))

    def bits() -> bytes:
        return bytes(draw.choice((0, 255, draw.randrange(256))) for _ in range(-(-V // 32) * 4))

    choices = [
        Choice(
            temperature=draw.choice((0.0, 1e-3, 0.7, 1.0, 5.0)),
            top_p=draw.choice((1.0, 0.9, 1e-6)),
            top_k=draw.choice((0, 1, 9, 10_000)),
            min_p=draw.choice((0.0, 0.0, 0.3)),
            u=draw.random(),
            repetition=draw.choice((1.0, 1.3)),
            frequency=draw.choice((0.0, 0.5)),
            presence=draw.choice((0.0, -0.5)),
            seen=ids(20),
            counted=ids(20) * 2,
            mask=draw.choice((None, bits(), bits(), b"\xff" * (-(-V // 32) * 4))),
            allowed=ids(20) or None,
            bias=dict.fromkeys(ids(5), 3.0),
            banned=ids(5),
            report=draw.choice((None, "raw", "tempered", "processed")),
            tops=draw.choice((0, 1, 5)),
        )
        for _ in range(R)
    ]
    yield choose(logits, choices)
    yield score(logits, [draw.randrange(V) for _ in range(R)], draw.choice((0, 3)))


@case(token_logprobs, logprobs_of)
def likelihoods(draw: Draw) -> Iterable[Any]:
    R, D, V = draw.size(64), draw.size(64, 1), draw.choice((1, 2, 17, 255, 1000, 5003))
    hidden, w = draw.floats(R, D, wild=True), draw.floats(V, D, dtype=draw.choice(FLOATS))
    bias, ids = draw.floats(V) if draw.maybe() else None, draw.integers(0, V, R)
    how = (draw.choice((1.0, 0.5)), draw.choice((None, 30.0)), draw.maybe(), draw.choice((1.0, 0.7)))
    yield token_logprobs(hidden, w, bias, ids, *how)
    yield from backward(lambda *leaves: token_logprobs(*leaves, bias, ids, *how), hidden, w)
    yield logprobs_of(draw.floats(R, V, wild=True), ids)


@case(adamw, adam, sgd, lion, adagrad, square_sums)
def updates(draw: Draw) -> Iterable[Any]:
    rule, states, settings = draw.choice(
        (
            (adamw, 2, {"betas": (0.9, 0.95), "eps": 1e-8}),
            (adam, 2, {"betas": (0.9, 0.95), "eps": 1e-8}),
            (sgd, 0, {}),
            (sgd, 1, {"momentum": 0.9, "nesterov": draw.choice((True, False))}),
            (lion, 1, {"betas": (0.9, 0.99)}),
            (adagrad, 1, {"eps": 1e-10}),
        )
    )
    sizes = [draw.choice((0, 1, 17, 16_384, 40_000)) for _ in range(draw.randrange(5))]
    made = [[draw.floats(size).contiguous() for _ in range(2 + states)] for size in sizes]
    shards = [
        Shard(w, g, tuple(state.square() for state in kept), draw.randrange(1, 99), draw.choice((0.0, 0.1)))
        for w, g, *kept in made
    ]
    rule(shards, rate=0.01, scale=draw.choice((1.0, 0.3)), **settings)
    yield from (part for shard in shards for part in (shard.weight, *shard.states))
    yield square_sums([shard.grad for shard in shards])


@case()
def engines(draw: Draw) -> Iterable[Any]:
    """Whole models: the programs' stages that no op calls alone."""
    dtype = draw.choice(FLOATS)
    model = tiny.decoder(draw.choice(list(tiny.SPECS.values())), dtype)
    numbers = draw.sample(range(40), 3)
    requests = [tiny.request(number, length=draw.choice((1, 9, 40)), max_tokens=3) for number in numbers]
    yield tiny.run(tiny.engine(model, num_blocks=64, max_num_batched_tokens=128), *requests)


# ------------------------------------------------------------------------------------------------------------ all
def bits_of(result: Any) -> bytes:
    """A result to the last bit, but for which of the many numbers that are not numbers it holds."""
    if not isinstance(result, Tensor):
        return repr(result).encode()
    result = result.detach().contiguous()
    if result.is_floating_point():
        result = result.float().masked_fill(result.isnan(), torch.nan)
    return (
        repr(tuple(result.shape)).encode()
        + result.view(torch.uint8 if result.numel() else result.dtype).numpy().tobytes()
    )


def digest(name: str, calls: int) -> str:
    """What `calls` calls of one case gave."""
    found = hashlib.sha256()
    for number in range(calls):
        for result in CASES[name][1](Draw(f"{name} {number}")):
            found.update(bits_of(result))
    return found.hexdigest()[:16]


def covered() -> set[str]:
    """Names of the ops that the cases call."""
    return {op.name for ops, _ in CASES.values() for op in ops}


def uncovered() -> set[str]:
    """Ops with a CPU kernel that no case calls."""
    return {op.name for op in all_ops() if "native" in op.implementations} - covered()


def not_run(library: native.Library) -> str:
    """Stages in the sources that nothing has called yet."""
    known = {name for file in native.HERE.glob("*.cpp") for name in re.findall(r"TF_STAGE\((\w+)\)", file.read_text())}
    return ", ".join(sorted(known - {kind.__name__ for kind in library._kernels})) or "none"


def go_past_the_end() -> None:
    """What a sanitizer must see: weights that are shorter than the stage says."""
    x, w, out, rows = torch.randn(1, 64), torch.randn(16, 64), torch.empty(1, 32), ctypes.c_int32(1)
    stage = stage_of(x, w, None, out, ctypes.addressof(rows))
    stage.n += 1
    run(stage)


def main(calls: int, *options: str) -> None:
    if "--sanitized" in options:
        native.make = functools.partial(native.make, extra=SANITIZE)
    torch.set_num_threads(int(os.environ.get("FUZZ_THREADS", "3")))
    library = native.library()
    assert library is not None, native.missing()
    if "--past-the-end" in options:
        go_past_the_end()
    print("kernels", library.isa)
    for name in CASES:
        print(name, digest(name, calls), flush=True)
    print("stages not run:", not_run(library))


if __name__ == "__main__":
    main(int(sys.argv[1]), *itertools.islice(sys.argv, 2, None))
