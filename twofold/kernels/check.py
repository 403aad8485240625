"""check: is an implementation its reference, over shapes, dtypes and strides, forward and backward?

    for each case  sizes of T, D, ... x dtype x how the inputs lie in memory
        forward    within a bound of the reference, or to the last bit where the implementation says so; twice alike;
                   inputs untouched; nothing left unwritten, nothing written past an output's ends
        backward   gradients within a bound of the reference's in fp64

The report names the first case that failed, with its arguments.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..core import ConfigError, TwofoldError
from .compiled import Compiled
from .joined import Kernel, listed
from .op import Call, Implementation, Op
from .shapes import axes, letters, shape_of

SIZES = (0, 1, 2, 5, 16, 33)
STRIDES = ("contiguous", "transposed", "sliced", "offset", "expanded")
BOUNDS = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
_CASES = 300
_GUARD = 64  # numbers before and after each output, of which none may change

Inputs = Callable[[Mapping[str, int], torch.dtype, torch.Generator], tuple[Any, ...]]


@dataclass(slots=True)
class Report:
    """What a check found; printed, it is one line, and the first failing case with its arguments."""

    op: str
    implementation: str
    lacks: str = ""
    cases: int = 0
    forward: float = 0.0
    backward: float = 0.0
    failures: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether it ran, and every case passed."""
        return not self.lacks and not self.failures and self.cases > 0

    def __str__(self) -> str:
        name = f"{self.op}, '{self.implementation}'"
        if self.lacks:
            return f"{name}: not checked, {self.lacks}"
        if self.failures:
            return f"{name}: {len(self.failures)} of {self.cases} cases fail. The first: {self.failures[0]}"
        if not self.cases:
            return f"{name}: not checked, it is for none of the cases"
        errors = f"largest error {self.forward:.1e}, of gradients against fp64 {self.backward:.1e}"
        return f"{name}: {self.cases} cases agree with the reference; {errors}"


@dataclass(frozen=True, slots=True)
class _Case:
    sizes: Mapping[str, int]
    dtype: torch.dtype
    stride: str
    number: int


class _Differs(Exception):
    """One case fails."""


class _Strays(_Differs):
    """It wrote where it must not; another case could end the process."""


def check(
    op: Op[..., Any],
    implementation: str | None = None,
    *,
    shapes: Mapping[str, Sequence[int]] | None = None,
    dtypes: Sequence[torch.dtype] = (torch.float32,),
    strides: Sequence[str] = STRIDES,
    values: Mapping[str, Any] | None = None,
    inputs: Inputs | None = None,
    bound: float | None = None,
    gradient_bound: float | None = None,
    gradients: bool = True,
    rows: str | None = None,
    seed: int = 0,
) -> Report:
    """Compare an implementation with its op's reference; at most 300 cases, drawn by `seed` where there are more.

    Args:
        implementation: which one; the op's first when not given.
        shapes: sizes to try of each dimension; SIZES for those that are not named.
        values: of parameters that are not tensors, where they have no default.
        inputs: makes the arguments from (sizes, dtype, generator); normal random numbers by the tensors' names when not
            given. Floating-point tensors among them are laid out by `strides`.
        bound: on |y - reference| / (1 + |reference|), BOUNDS of the dtype when not given; ten times as much, relative
            to a tensor's largest number, for gradients unless `gradient_bound` is given.
        rows: a first dimension, such as "T", whose rows must have the same bits with and without the others.

    Raises:
        ConfigError: a name that the op does not have, or inputs that cannot be made up.
    """
    item = _item(op, implementation)
    strange = set(strides) - set(STRIDES)
    if strange:
        raise ConfigError(f"strides are {', '.join(STRIDES)}, not {', '.join(sorted(strange))}")
    if rows is not None and not _with_rows(op.reader.names, rows):
        raise ConfigError(f"{op.name} has no tensor whose name says that its first dimension is {rows}")
    report = Report(op.name, item.name, lacks=item.needs.lacking() or item.missing())
    if report.lacks:
        return report
    made = inputs or _maker(op, item, dict(values or {}))
    limits = (bound, gradient_bound)
    for case in _cases(op, dict(shapes or {}), dtypes, strides, seed):
        if item.needs.unmet(_call(item, case)):
            continue
        report.cases += 1
        args = op.reader.whole(made(case.sizes, case.dtype, torch.Generator().manual_seed(seed + case.number)), {})
        args = tuple(_laid(arg.to(_device(item)), case.stride) if isinstance(arg, Tensor) else arg for arg in args)
        try:
            report.forward = max(report.forward, _forward(op, item, args, case, limits[0]))
            if rows is not None:
                _rows(item, args, op.reader.names, rows)
            if gradients:
                report.backward = max(report.backward, _backward(op, item, args, case, limits))
        except (_Differs, TwofoldError, RuntimeError, TypeError, ValueError) as error:
            report.failures.append(f"{_spelled(op, args, case)}: {error}")
            if isinstance(error, _Strays):
                break
    report.lacks = item.missing()  # what refuses to run only when it runs, as Triton's compiler does
    return report


def _item(op: Op[..., Any], name: str | None) -> Implementation[..., Any]:
    if not op.implementations:
        raise ConfigError(f"{op.name} has no implementation beside its reference: there is nothing to check")
    return op.implementation(name or next(iter(op.implementations)))


def _call(item: Implementation[..., Any], case: _Case) -> Call:
    return Call(device=_device(item), dtype=case.dtype, shapes=case.sizes)


def _device(item: Implementation[..., Any]) -> str:
    devices = item.needs.devices
    return devices[0] if devices and "cpu" not in devices else "cpu"


# ---------------------------------------------------------------------------------------------------------- the cases
def _cases(
    op: Op[..., Any],
    shapes: Mapping[str, Sequence[int]],
    dtypes: Sequence[torch.dtype],
    strides: Sequence[str],
    seed: int,
) -> list[_Case]:
    names = sorted(set[str]().union(*(letters(name) for name in op.reader.all_tensors)) | set(shapes))
    each = itertools.product(*(shapes.get(name, SIZES) for name in names))
    found = [
        _Case(dict(zip(names, sizes, strict=True)), dtype, stride, number)
        for number, (sizes, dtype, stride) in enumerate(itertools.product(each, dtypes, strides))
    ]
    if len(found) > _CASES:
        found = random.Random(seed).sample(found, _CASES)
    # Empty ones last: a kernel that leaves its output is found out where there are guards, not at a null pointer.
    return sorted(found, key=lambda case: (0 in case.sizes.values(), case.number))


def _maker(op: Op[..., Any], item: Implementation[..., Any], values: Mapping[str, Any]) -> Inputs:
    """Arguments made up from the parameters' names; an optional tensor is there in every other case."""
    reader = op.reader
    values = {**(item.run.fixed if isinstance(item.run, Kernel) else {}), **values}
    for name in reader.names:
        if name not in values and name not in reader.all_tensors and name not in reader.defaults:
            raise ConfigError(f"check({op.name}): what is {name}? Give values={{'{name}': ...}}, or inputs=...")

    def made(sizes: Mapping[str, int], dtype: torch.dtype, generator: torch.Generator) -> tuple[Any, ...]:
        absent = bool(torch.randint(2, (), generator=generator))
        args: list[Any] = []
        for name in reader.names:
            if name in values:
                args.append(values[name])
            elif name not in reader.all_tensors:
                args.append(reader.defaults[name])
            elif absent and name in reader.optional:
                args.append(None)
            else:
                args.append(torch.randn(shape_of(name, sizes), generator=generator).to(dtype))
        return tuple(args)

    return made


def _laid(x: Tensor, how: str) -> Tensor:
    return lay(x, how) if x.is_floating_point() else x


def lay(x: Tensor, how: str) -> Tensor:
    """The same numbers otherwise in memory; what lies between them is NaN. `expanded` repeats the first row."""
    if how == "transposed" and x.dim() > 1:
        return x.mT.contiguous().mT
    if how in ("sliced", "transposed") and x.dim():
        wide = x.new_full((*x.shape[:-1], 2 * x.shape[-1]), torch.nan)
        wide[..., ::2] = x
        return wide[..., ::2]
    if how == "offset":
        longer = x.new_full((x.numel() + 1,), torch.nan)
        longer[1:] = x.flatten()
        return longer[1:].view(x.shape)
    if how == "expanded" and x.dim() and x.shape[0]:
        return x[:1].expand(x.shape)
    return x


# ---------------------------------------------------------------------------------------------------- the comparisons
def _forward(
    op: Op[..., Any], item: Implementation[..., Any], args: tuple[Any, ...], case: _Case, bound: float | None
) -> float:
    before = [arg.clone() if isinstance(arg, Tensor) else arg for arg in args]
    with torch.no_grad():
        with _watched(item):
            outs = listed(item.run(*args))
        again = listed(item.run(*args))
        plain, truth = listed(op.reference(*args)), listed(op.reference(*_double(args)))
    for name, arg, old in zip(op.reader.names, args, before, strict=True):
        if isinstance(arg, Tensor) and not _same(arg, old):
            raise _Differs(f"the kernel changes its input {name}")
    if len(outs) != len(plain):
        raise _Differs(f"{len(outs)} outputs, the reference has {len(plain)}")
    worst = 0.0
    for at, (out, twin, short, long) in enumerate(zip(outs, again, plain, truth, strict=True)):
        if (out.shape, out.dtype) != (short.shape, short.dtype):
            raise _Differs(f"output {at} is {_kind(out)}, the reference's is {_kind(short)}")
        if not _same(out, twin):
            raise _Differs(f"output {at} has other bits when run again: a number is left unwritten, or a race")
        if item.bits == "reference" or not out.is_floating_point():
            if not _same(out, short):
                raise _Differs(_where(at, out, short, "which it should equal to the last bit"))
            continue
        error = ((out.double() - long.double()).abs() / (1 + long.double().abs())).nan_to_num(nan=torch.inf)
        error = error.masked_fill((out.isnan() & long.isnan()) | (out.double() == long.double()), 0.0)
        limit = BOUNDS[case.dtype] if bound is None else bound
        worst = max([worst, *error.flatten().max(dim=0, keepdim=True).values.tolist()] if error.numel() else [worst])
        if worst > limit:
            raise _Differs(_where(at, out, short, f"error {worst:.1e}, bound {limit:.1e}"))
    return worst


def _backward(
    op: Op[..., Any],
    item: Implementation[..., Any],
    args: tuple[Any, ...],
    case: _Case,
    limits: tuple[float | None, float | None],
) -> float:
    found = _gradients(item.run, args, case)
    truth = _gradients(op.reference, _double(args), case)
    usual = 10 * (BOUNDS[case.dtype] if limits[0] is None else limits[0])
    limit, worst = usual if limits[1] is None else limits[1], 0.0
    for name, arg, grad, right in zip(op.reader.names, args, found, truth, strict=True):
        if not isinstance(arg, Tensor) or right is None or not right.numel():
            continue
        if grad is None:
            if bool(right.any()):
                raise _Differs(f"there is no gradient of {name}")
            continue
        scale = max(1.0, float(right.abs().max()))
        error = float(((grad.double() - right).abs() / scale).nan_to_num(nan=torch.inf).max())
        worst = max(worst, error)
        if error > limit:
            raise _Differs(f"the gradient of {name} is {error:.1e} from the one in fp64, bound {limit:.1e}")
    return worst


def _gradients(run: Callable[..., Any], args: tuple[Any, ...], case: _Case) -> list[Tensor | None]:
    """Gradients of a random weighted sum of the outputs, a place for each argument."""
    leaves = [arg.detach().requires_grad_(arg.is_floating_point()) if isinstance(arg, Tensor) else arg for arg in args]
    outs = [out for out in listed(run(*leaves)) if out.requires_grad]
    wanted = [at for at, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.requires_grad]
    found: list[Tensor | None] = [None] * len(args)
    if outs and wanted:
        generator = torch.Generator().manual_seed(case.number)
        weights = [torch.randn(out.shape, generator=generator).to(case.dtype).to(out) for out in outs]
        parts = torch.autograd.grad(outs, [leaves[at] for at in wanted], weights, allow_unused=True)
        for at, part in zip(wanted, parts, strict=True):
            found[at] = part
    return found


def _rows(item: Implementation[..., Any], args: tuple[Any, ...], names: Sequence[str], letter: str) -> None:
    """Rows computed without the others have the bits that they have among them (the numerics contract)."""
    at = _with_rows(names, letter)
    count = min([args[place].shape[0] for place in at if args[place] is not None], default=0)
    with torch.no_grad():
        whole = listed(item.run(*args))
        for some in (slice(0, 1), slice(count // 2, count)) if count > 1 else ():
            part = [arg[some] if place in at and arg is not None else arg for place, arg in enumerate(args)]
            for one, all_ in zip(listed(item.run(*part)), whole, strict=True):
                if not _same(one, all_[some]):
                    raise _Differs(f"rows {some.start}:{some.stop} of {letter} have other bits without the others")


def _with_rows(names: Sequence[str], letter: str) -> list[int]:
    """Where the tensors are whose first dimension is this letter."""
    return [at for at, name in enumerate(names) if (axes(name) or ((0, ""),))[0] == (1, letter)]


@contextlib.contextmanager
def _watched(item: Implementation[..., Any]) -> Iterator[None]:
    """Outputs of a compiled kernel lie between guards and are NaN before it runs.

    Raises:
        _Strays: it wrote before or after an output.
    """
    if not (isinstance(item.run, Kernel) and isinstance(item.run.body, Compiled)):
        yield
        return
    guards: list[Tensor] = []

    def make(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        count = math.prod(shape)
        wide = torch.empty(count + 2 * _GUARD, dtype=dtype, device=device)
        wide.fill_(torch.nan if dtype.is_floating_point else 1)
        guards.extend((wide[:_GUARD], wide[_GUARD + count :]))
        return wide[_GUARD : _GUARD + count].view(shape)

    with item.run.body.made_by(make):
        yield
    for guard in guards:
        untouched = guard.isnan() if guard.is_floating_point() else guard == 1
        if not bool(untouched.all()):
            raise _Strays("the kernel writes before the beginning or past the end of an output")


def _double(args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(arg.double() if isinstance(arg, Tensor) and arg.is_floating_point() else arg for arg in args)


def _same(a: Tensor, b: Tensor) -> bool:
    """Equal to the last bit, a NaN being equal to a NaN."""
    return a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all())


# ----------------------------------------------------------------------------------------------------------- in words
def _where(at: int, out: Tensor, right: Tensor, why: str) -> str:
    gap = (out.double() - right.double()).abs().nan_to_num(nan=torch.inf)
    gap = gap.masked_fill(out.isnan() & right.isnan(), 0.0)
    worst = int(gap.argmax())
    index = ", ".join(str(int(i)) for i in torch.unravel_index(torch.tensor(worst), out.shape))
    values = f"{out.flatten()[worst].item()!r}, the reference has {right.flatten()[worst].item()!r}"
    return f"output {at} at [{index}] is {values}: {why}"


def _kind(x: Tensor) -> str:
    return f"{tuple(x.shape)} {str(x.dtype).removeprefix('torch.')}"


def _spelled(op: Op[..., Any], args: tuple[Any, ...], case: _Case) -> str:
    """A case and its call, so that it can be made again."""
    words = [
        f"{name}={_kind(arg)} strides {arg.stride()}" if isinstance(arg, Tensor) else f"{name}={arg!r}"
        for name, arg in zip(op.reader.names, args, strict=True)
    ]
    sizes = " ".join(f"{name}={size}" for name, size in case.sizes.items())
    return f"{sizes} {case.stride}, {op.name}({', '.join(words)})"
