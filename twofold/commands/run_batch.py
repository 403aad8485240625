"""`twofold run-batch`: a file of requests answered without a server."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from ..engine.config import EngineConfig
from ..serve.batches.offline import answer_file
from ..serve.config import ServeConfig
from ..serve.log import set_up


def run_batch(model: Path, name: str | None, source: Path, out: Path, engine: EngineConfig) -> int:
    """Answer and say how many; the exit code is 1 when a line was answered with an error."""
    set_up("plain")
    config = ServeConfig(model=model, served_model_name=name)
    counts = asyncio.run(answer_file(config, engine, source, out, tell=lambda line: print(line, file=sys.stderr)))
    print(f"{counts.completed} of {counts.total} lines answered, {counts.failed} with an error: {out}")
    return 1 if counts.failed else 0
