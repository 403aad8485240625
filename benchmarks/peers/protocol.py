"""How a runner is spoken to: one JSON object a line on standard input, one answer a line on standard output.

    -> {"prompts": [[id]], "outputs": [n], "shared": 512, "caching": true}    requests that come at once; EOS is ignored
    <- {"seconds": s, "tokens": [[id]], "peak_mib": m, ...}                   the run's own time, nothing of the pipe's

The first line of all is {"ready": "name version, settings"}. `shared` is how many first tokens all prompts have in
common when the workload is about that, else 0; `caching` whether the engine may look for them by itself. Engines print
what they like: their standard output goes where their errors go. Nothing here imports an engine, and every runner
stands in an environment of its own.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

Question = dict[str, Any]
Tokens = list[list[int]]


class Channel:
    """The pipe to the benchmark. Made before the engine is imported: engines write to standard output as they load."""

    def __init__(self) -> None:
        self._out = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)
        if sys.platform == "linux":  # a runner that was stopped for its turn would outlive a benchmark that was killed
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)

    def tell(self, message: dict[str, Any]) -> None:
        print(json.dumps(message), file=self._out, flush=True)

    def serve(
        self,
        name: str,
        run: Callable[[Question], Tokens],
        *,
        prepare: Callable[[Question], object] = lambda question: None,
        more: Callable[[], dict[str, Any]] = dict,
    ) -> None:
        """Say that the engine is ready, then answer questions until there are no more.

        `prepare` is not timed; what `more` tells afterwards joins the answer.
        """
        self.tell({"ready": name})
        for line in sys.stdin:
            question = json.loads(line)
            prepare(question)
            start = time.perf_counter()
            tokens = run(question)
            seconds = time.perf_counter() - start
            self.tell({"seconds": seconds, "tokens": tokens, "peak_mib": peak_mib()} | more())


def peak_mib() -> int:
    """The most memory this process has held, pages of mapped files included."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def arguments(about: str | None) -> argparse.ArgumentParser:
    """What every runner takes."""
    parser = argparse.ArgumentParser(description=(about or "").splitlines()[0], allow_abbrev=False)
    parser.add_argument("--model", required=True, help="directory or file, in this engine's own form")
    parser.add_argument("--threads", type=int, required=True)
    return parser
