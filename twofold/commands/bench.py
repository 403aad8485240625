"""Finds and runs the benchmarks: scripts beside the package in a checkout, under `share/` when installed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from ..core import ConfigError

BENCHMARKS = (
    "throughput",
    "latency",
    "serve",
    "scenarios",
    "splitfuse",
    "inject",
    "hostile",
    "start",
    "limits",
    "quality",
    "held_out",
    "serving",
    "kernels",
    "speculation",
    "beams",
    "streamed",
    "sparse",
    "gpu",
    "recompute",
    "offload",
    "balance",
    "zero",
    "train_peers",
    "adapters",
    "overlap",
    "rollouts",
    "rollout_peers",
    "embeddings",
    "tiers",
)


def bench(name: str, flags: list[str]) -> int:
    """Run one benchmark in a process of its own, with this package on its path; its exit code is ours."""
    package = Path(__file__).resolve().parents[2]
    paths = [str(package), *filter(None, [os.environ.get("PYTHONPATH")])]
    script = folder() / f"{name}.py"
    done = subprocess.run(
        [sys.executable, str(script), *flags], env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    )
    return done.returncode


def folder() -> Path:
    """Where the benchmarks lie. Raises ConfigError when this installation came without them."""
    places = (Path(__file__).resolve().parents[2] / "benchmarks", Path(sys.prefix) / "share" / "twofold" / "benchmarks")
    for place in places:
        if (place / "throughput.py").is_file():
            return place
    raise ConfigError(f"the benchmarks are in none of {', '.join(map(str, places))}: run from a checkout")
