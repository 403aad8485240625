"""`twofold train` for torchrun, its first steps slow, and, at the first attempt, a rank that goes wrong at one of them:

python paced.py SECONDS WHAT recipe.toml --set=key=value ...      WHAT is "well", "sleeps" or "strays"
"""

from __future__ import annotations

import os
import sys
import time
from typing import Any

from twofold.commands.train import parse_change
from twofold.train import launch
from twofold.train.trainer import Trainer

STEP = 7
STEPS = 30


def main(seconds: str, what: str, recipe: str, *changes: str) -> int:
    original, first = Trainer.step, os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"

    def step(self: Trainer, batch: Any, **more: Any) -> Any:
        if self.position.step < STEPS:
            time.sleep(float(seconds))
        if first and self.mesh.rank_in_world == 1 and self.position.step == STEP:
            if what == "sleeps":
                time.sleep(600)
            elif what == "strays":
                self.mesh.sum("world", 1.0, 2.0, 3.0)
        return original(self, batch, **more)

    Trainer.step = step  # type: ignore[method-assign]
    return launch.run(recipe, dict(parse_change(change.removeprefix("--set=")) for change in changes))


sys.exit(main(*sys.argv[1:]))
