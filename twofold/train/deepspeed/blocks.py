"""Blocks: the repeated parts of any module, which are gathered one at a time."""

from __future__ import annotations

from collections import Counter

from torch import nn


def blocks_of(module: nn.Module) -> list[nn.Module]:
    """The children of the outermost module lists that hold parameters of nobody else, in order.

        model ── embed                          a GPT's layers, a T5's two stacks, a diffusion model's stages;
              ├─ layers: ModuleList ─┬─ 0  ◀──  what is inside of them (experts, projections) stays with them
              │                      └─ 1  ◀──
              └─ head

    A list of one says nothing of repetition, but its child may be large: it counts too. Children without a forward of
    their own are only containers, and are looked into.
    """
    found: list[nn.Module] = []
    _collect(module, found)
    owners = Counter(id(p) for block in dict.fromkeys(found) for p in set(block.parameters()))
    inside = {id(p) for block in found for p in block.parameters()}
    outside = {id(p) for p in _apart(module, {id(block) for block in found})} & inside
    return [
        block
        for block in dict.fromkeys(found)
        if any(True for _ in block.parameters())
        and not any(id(p) in outside or owners[id(p)] > 1 for p in block.parameters())
    ]


def _collect(module: nn.Module, found: list[nn.Module]) -> None:
    for child in module.children():
        if isinstance(module, nn.ModuleList) and type(child).forward is not nn.Module.forward:
            found.append(child)
        else:
            _collect(child, found)


def _apart(module: nn.Module, blocks: set[int]) -> list[nn.Parameter]:
    """The parameters that are met on the way to the blocks."""
    own = list(module.parameters(recurse=False))
    for child in module.children():
        if id(child) not in blocks:
            own += _apart(child, blocks)
    return own
