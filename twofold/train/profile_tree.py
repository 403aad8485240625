"""A profile as a tree of modules: own figures at each node, sums of a node and all below it, and a table to read.

step                   share  forward  backward  again  GFLOP  GFLOP/s  weights  kept
├─ decoder
│  ├─ layers 0-3 (4)   layers with the same spec, summed
│  │  ├─ norm1
│  │  └─ qkv
│  └─ norm
└─ token_logprobs
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

ROOT = ""
COLUMNS = ("", "share", "forward ms", "backward ms", "again ms", "GFLOP", "GFLOP/s", "weights", "kept MiB")


class Node:
    """A module, or an op that a module with children calls by itself; figures are its own until `total` adds up."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.flops: Counter[str] = Counter()
        self.held = 0
        self.parameters = 0
        self.children: dict[str, Node] = {}

    def at(self, path: str) -> Node:
        """The node below this one at a dotted path, made when it is not there; a layer and its number are one name."""
        node = self
        for name in names(path):
            node = node.children.setdefault(name, Node(name))
        return node

    def total(self) -> Node:
        """A node without children that holds the sums of this one and all below."""
        out = Node(self.name)
        for node in self.walk():
            out.add(node)
        return out

    def add(self, other: Node) -> None:
        """Take another's own figures in."""
        for phase, seconds in other.seconds.items():
            self.seconds[phase] += seconds
        self.flops.update(other.flops)
        self.held += other.held
        self.parameters += other.parameters

    def merge(self, other: Node) -> None:
        """Take another in, children and all."""
        self.add(other)
        for name, child in other.children.items():
            self.children.setdefault(name, Node(name)).merge(child)

    def walk(self) -> Iterator[Node]:
        yield self
        for child in self.children.values():
            yield from child.walk()

    def plain(self) -> dict[str, Any]:
        """Sums as JSON has them; seconds and FLOPs by phase."""
        total = self.total()
        return {
            "name": self.name or "step",
            "seconds": {phase: round(value, 9) for phase, value in total.seconds.items()},
            "flops": {phase: value for phase, value in total.flops.items() if value},
            "parameters": total.parameters,
            "activation_bytes": total.held,
            "children": [child.plain() for child in self.children.values()],
        }


def names(path: str) -> list[str]:
    """ "decoder.layers.3.qkv" as decoder, layers.3, qkv."""
    out: list[str] = []
    for part in filter(None, path.split(".")):
        if part.isdigit() and out:
            out[-1] += f".{part}"
        else:
            out.append(part)
    return out


def grouped(root: Node, kinds: Mapping[str, object]) -> Node:
    """A copy in which nodes of one kind, given by path, are one; a kind of one keeps its name."""
    members: dict[object, list[str]] = {}
    for path, kind in kinds.items():
        members.setdefault(kind, []).append(names(path)[-1])
    titles = {name: _title(group) for group in members.values() for name in group}
    return _renamed(root, titles)


def _renamed(node: Node, titles: Mapping[str, str]) -> Node:
    out = Node(node.name)
    out.add(node)
    for name, child in node.children.items():
        title = titles.get(name, name)
        out.children.setdefault(title, Node(title)).merge(_renamed(child, titles))
    return out


def _title(members: list[str]) -> str:
    if len(members) == 1:
        return members[0]
    stem, numbers = members[0].rpartition(".")[0], [int(name.rpartition(".")[2]) for name in members]
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    spans = [f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs]
    return f"{stem} {','.join(spans)} ({len(numbers)})"


def table(root: Node) -> str:
    """The tree as text, a row a node, every figure the sum of it and all below."""
    whole = sum(root.total().seconds.values()) or 1.0
    rows = [COLUMNS, *(_row(lead, node, whole) for lead, node in _lines(root, "", ""))]
    widths = [max(len(row[i]) for row in rows) for i in range(len(COLUMNS))]
    return "\n".join(
        "  ".join(cell.rjust(width) if i else cell.ljust(width) for i, (cell, width) in enumerate(zip(row, widths)))
        for row in rows
    )


def _lines(node: Node, lead: str, below: str) -> Iterator[tuple[str, Node]]:
    yield lead + (node.name or "step"), node
    children = list(node.children.values())
    for number, child in enumerate(children):
        last = number == len(children) - 1
        yield from _lines(child, below + ("└─ " if last else "├─ "), below + ("   " if last else "│  "))


def _row(title: str, node: Node, whole: float) -> tuple[str, ...]:
    total = node.total()
    seconds, flops = sum(total.seconds.values()), sum(total.flops.values())
    times = (total.seconds[phase] for phase in ("forward", "backward", "again"))
    return (
        title,
        f"{seconds / whole:.1%}",
        *(f"{1e3 * value:.2f}" if value else "" for value in times),
        f"{flops / 1e9:.3f}" if flops else "",
        f"{flops / seconds / 1e9:.1f}" if flops and seconds else "",
        f"{total.parameters:,}" if total.parameters else "",
        f"{total.held / 2**20:.2f}" if total.held else "",
    )
