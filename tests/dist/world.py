"""Real processes that join over gloo on this machine and run one function each; their answers, in order.

A server process imports torch once and forks the ranks, so that each starts in milliseconds.
"""

from __future__ import annotations

import multiprocessing
import pickle
import queue
import time
import traceback
from collections.abc import Callable
from typing import Any

from tests.ports import free_port

LIMIT = 120.0


def run_ranks(world: int, work: Callable[..., Any], *args: Any, limit: float = LIMIT) -> list[Any]:
    """`work(rank, *args)` in `world` processes, joined; what each returned. A failure of one is raised here."""
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["torch", "torch.distributed.fsdp", "twofold.parallel", "twofold.train.launch"])
    answers: Any = processes.Queue()
    port = free_port()
    ranks = [processes.Process(target=_rank, args=(rank, world, port, answers, work, args)) for rank in range(world)]
    for process in ranks:
        process.start()
    found: dict[int, Any] = {}
    ends = time.monotonic() + limit
    try:
        while len(found) < world:
            try:
                rank, fault, answer = answers.get(timeout=0.2)
            except queue.Empty:
                dead = [i for i, p in enumerate(ranks) if p.exitcode not in (None, 0) and i not in found]
                if dead:
                    raise AssertionError(f"rank {dead[0]} ended with {ranks[dead[0]].exitcode}") from None
                if time.monotonic() > ends:
                    raise AssertionError(f"ranks {sorted(set(range(world)) - set(found))} did not answer") from None
                continue
            if fault:
                raise AssertionError(f"rank {rank}:\n{fault}")
            found[rank] = pickle.loads(answer)
    finally:
        for process in ranks:
            process.join(5 if len(found) == world else 0)
            if process.is_alive():
                process.kill()
    return [found[rank] for rank in range(world)]


def _rank(rank: int, world: int, port: int, answers: Any, work: Callable[..., Any], args: tuple[Any, ...]) -> None:
    import torch

    from twofold.parallel import Ranks, joined

    torch.set_num_threads(1)
    torch.manual_seed(0)
    try:
        with joined(Ranks(rank=rank, world=world, local_rank=rank, local_world=world, port=port), timeout=60):
            answers.put((rank, None, pickle.dumps(work(rank, *args))))
    except BaseException:
        answers.put((rank, traceback.format_exc(), None))
