"""`twofold kernels`: every op, which implementation serves it here, and why."""

from __future__ import annotations

from ..kernels import all_ops


def kernels() -> int:
    for line in table():
        print(line)
    return 0


def table() -> list[str]:
    """A line for each op: its name, the implementation that serves it, the reason, and the others there are."""
    lines = [f"{'op':<20}{'served by':<14}why"]
    for op in all_ops():
        name, _, why = op.serving()
        lines.append(f"{op.name:<20}{name:<14}{why}")
        lines += [f"{'':<20}{other:<14}{_why_not(op.implementations[other].missing())}" for other in _others(op, name)]
    return lines


def _others(op: object, serving: str) -> list[str]:
    return [name for name in getattr(op, "implementations", {}) if name != serving]


def _why_not(missing: str) -> str:
    return f"not here: lacks {missing}" if missing else "not chosen: another comes first"
