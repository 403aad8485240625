"""`twofold launch`: print the file that starts a run on many machines."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from ..core import ConfigError, load_config
from ..parallel.launching import LaunchConfig, hostfile, kubernetes, slurm
from ..train.config import Recipe
from .train import parse_change


def launch(kind: str, recipe: str, changes: Sequence[str], config: LaunchConfig, hosts: str | None) -> int:
    """Print it. The recipe is read first, so that its mistakes are told here and not on a cluster."""
    load_config(Recipe, recipe, dict(map(parse_change, changes)))
    command = ["twofold", "train", recipe, *(word for change in changes for word in ("--set", change))]
    if kind == "hostfile":
        if hosts is None:
            raise ConfigError("twofold launch hostfile needs --hostfile FILE, with a line 'host slots=4' a machine")
        print(hostfile(command, config, Path(hosts), Path(os.getcwd())), end="")
    else:
        print((slurm if kind == "slurm" else kubernetes)(command, config), end="")
    return 0
