"""Which module may be replaced by what, from the outside in: feed-forwards and attention whole, then what is left.

feed-forward of three linear layers   -> one product for gate and up, our activation, our product
attention that transformers wrote     -> one product for queries, keys and values; our turn and our attention inside
norms, linear layers                  -> ours, each by itself
"""

from __future__ import annotations

import copy

import torch
from torch import nn

from .attention import Look, own_names, rebind
from .gated import GatedFeedForward, Norm, feed_forward, norms
from .joined import Part, Product, Shared, rounded, transposed
from .proof import disproof, sample
from .report import Fate, Report

OURS = (Product, GatedFeedForward)
_QKV = ("q_proj", "k_proj", "v_proj")


class Swap:
    """One pass over a model; `report` says what became of each module, `look` is the attention that all share."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.report = Report()
        self.look = Look()
        self.attentions: list[tuple[str, nn.Module]] = []

    @torch.no_grad()
    def run(self) -> Report:
        self._visit("", self.model)
        return self.report

    def _visit(self, name: str, module: nn.Module) -> None:
        for child_name, child in list(module.named_children()):
            path = f"{name}.{child_name}" if name else child_name
            if isinstance(child, OURS):
                continue
            new = self._replacement(path, child)
            if new is not None:
                setattr(module, child_name, new)
            elif list(child.children()):
                self._inside(path, child)
                self._visit(path, child)

    def _tell(self, name: str, module: nn.Module, by: str | None = None, why: str = "") -> None:
        self.report.fates.append(Fate(name=name, kind=type(module).__name__, by=by, why=why))

    def _replacement(self, name: str, old: nn.Module) -> nn.Module | None:
        """What goes into the place of a module, proven; None when it stays, which is then told."""
        new: nn.Module | None
        if type(old) is nn.Linear:
            return self._proven(name, old, Product.of(old), old.in_features, "our product")
        if (new := transposed(old)) is not None:
            return self._proven(name, old, new, new.in_features, "our product")
        if (new := feed_forward(old)) is not None:
            return self._proven(name, old, new, new.down.out_features, "one product for gate and up, ours for down")
        if candidates := list(norms(old)):
            return self._norm(name, old, candidates)
        if not list(old.children()):
            self._leave(name, old)
        return None

    def _proven(self, name: str, old: nn.Module, new: nn.Module, width: int, by: str) -> nn.Module | None:
        why = disproof(new, old, sample(width, old))
        self._tell(name, old, None if why else by, why)
        return None if why else new.train(old.training)

    def _norm(self, name: str, old: nn.Module, candidates: list[Norm]) -> nn.Module | None:
        """The norm that a module is with any weights: those it has may be all ones, which would prove too little."""
        other = copy.deepcopy(old)
        for number, parameter in enumerate(other.parameters()):
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)))
        x, why = sample(candidates[0].width, old), ""
        for new, tried in zip(candidates, norms(other), strict=True):
            why = disproof(tried, other, x)
            if not why:
                self._tell(name, old, "our norm")
                return new.train(old.training)
        self._tell(name, old, why=why)
        return None

    def _leave(self, name: str, old: nn.Module) -> None:
        if isinstance(old, nn.Embedding):
            self._tell(name, old, why="a look into a table, which has nothing to gain")
        elif list(old.parameters(recurse=False)):
            self._tell(name, old, why="no kernel of ours computes this")

    def _inside(self, name: str, module: nn.Module) -> None:
        """Attention stays its own module, with our operations inside."""
        children = dict(module.named_children())
        linears = [children.get(part) for part in _QKV]
        names, why = own_names(module, self.look)
        if names is None:
            if any(part in children for part in _QKV) or "attention" in type(module).__name__.lower():
                self._tell(name, module, why=why)
            elif list(module.parameters(recurse=False)):
                self._tell(name, module, why="it holds weights of its own, which no kernel of ours computes with")
            return
        rebind(module, names)
        self.attentions.append((name, module))
        by = "our attention" + (" and turn" if len(names) > 1 else "")
        if all(type(layer) is nn.Linear for layer in linears) and self._join(module, linears):  # type: ignore[arg-type]
            by = "one product for queries, keys and values, " + by
            for part in _QKV:
                self._tell(f"{name}.{part}", children[part], "a part of one product")
        self._tell(name, module, by)

    def _join(self, module: nn.Module, linears: list[nn.Linear]) -> bool:
        """Make one product of three linear layers; False when they cannot be one."""
        q, k, v = linears
        if len({each.in_features for each in linears}) > 1 or len({each.bias is None for each in linears}) > 1:
            return False
        olds = [(each.weight.clone(), each.bias) for each in (q, k, v)]
        shared = Shared(linears)
        x = sample(q.in_features, q)
        for part, (weight, bias) in zip(shared.parts, olds, strict=True):
            if disproof(part, lambda x, w=weight, b=bias: nn.functional.linear(x, w, b), x):  # type: ignore[misc]
                return False
        for name, part in zip(_QKV, shared.parts, strict=True):
            setattr(module, name, part)
        return True


def to_int8(model: nn.Module) -> None:
    """Round the weights of all products but the head's to int8; what they were is given back to the machine."""
    for name, module in model.named_modules():
        if isinstance(module, Product) and not isinstance(module, Part) and "lm_head" not in name:
            module.codes = rounded(module.rows)
            _forget(module)
    shared = {id(part._shared[0]): part._shared[0] for part in model.modules() if isinstance(part, Part)}
    for product in shared.values():
        product.codes = rounded(product.weight)
        product.weight = product.weight.new_empty(0)
        for part in product.parts:
            _forget(part)


def _forget(module: Product) -> None:
    """A weight of no elements but its shape: who asks for it learns how large it was."""
    module.weight = nn.Parameter(module.weight.new_empty(()).expand(module.weight.shape), requires_grad=False)
