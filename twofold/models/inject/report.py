"""What became of each module of a model: replaced by what, or left and why."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class Fate:
    """One module. `by` is what stands in its place, None when it was left; `why` says why it was left."""

    name: str
    kind: str
    by: str | None = None
    why: str = ""


@dataclass(kw_only=True)
class Report:
    """Every module that has weights or attends, in the model's order; and how far the whole is from what it was.

    `difference` is the largest difference of the output on some tokens, as a share of its largest number; `bound` is
    what was allowed. Both are None when nobody looked.
    """

    fates: list[Fate] = field(default_factory=list)
    difference: float | None = None
    bound: float | None = None

    @property
    def replaced(self) -> list[Fate]:
        return [fate for fate in self.fates if fate.by is not None]

    @property
    def left(self) -> list[Fate]:
        return [fate for fate in self.fates if fate.by is None]

    def __str__(self) -> str:
        """Like modules told together: how many, of which class, by what or why not."""
        rows = Counter((fate.kind, fate.by or "", fate.why) for fate in self.fates)
        lines = []
        for (kind, by, why), count in rows.items():
            lines.append(f"{count:>5} x {kind:<28} {'-> ' + by if by else 'left: ' + why}")
        if self.difference is not None:
            lines.append(f"outputs differ by {self.difference:.1e} of the largest, allowed {self.bound:.0e}")
        return "\n".join(lines)
