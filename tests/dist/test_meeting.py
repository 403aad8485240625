"""Where ranks meet: who fails first is the one that speaks, and who waits in vain says for whom."""

from __future__ import annotations

import socket
import time

import pytest
from world import run_ranks

from tests.ports import free_port
from twofold.core import WorkerError
from twofold.parallel import Ranks, joined
from twofold.parallel.messages import everyone, from_first
from twofold.parallel.ranks import Meeting


def test_a_port_that_is_taken_is_named() -> None:
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", free_port()))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(WorkerError, match=rf"port {port} of 127\.0\.0\.1 is taken by another process: give"):
            with joined(Ranks(rank=0, world=2, local_rank=0, local_world=2, port=port), timeout=1.0):
                raise AssertionError("there is nobody to meet")


def test_a_rank_that_waits_in_vain_says_so() -> None:
    alone = Ranks(rank=1, world=2, local_rank=1, local_world=2, port=free_port())
    with pytest.raises(WorkerError, match=r"rank 1 of 2 waited 1 s at 127\.0\.0\.1:\d+, and not all the others came"):
        with joined(alone, timeout=1.0):
            raise AssertionError("there is nobody to meet")


def test_alone_nobody_is_waited_for() -> None:
    with joined(Ranks()) as meeting:
        assert meeting.first("anything") and meeting.first("anything")
        with meeting.after("data", main=False, fault="failed"):
            pass


def test_one_is_first_and_the_main_one_goes_before() -> None:
    found = run_ranks(3, _meet)
    assert sorted(first for first, _, _ in found) == [False, False, True]
    assert all(done > found[0][1] for _, done, _ in found[1:])
    assert [told for _, _, told in found] == [[[0, 0], [1, 1], [2, 4], "main"]] * 3


def _meet(rank: int) -> tuple[bool, float, list]:
    import torch.distributed as dist

    meeting = Meeting(dist.distributed_c10d._get_default_store())
    with meeting.after("data", rank == 0, "failed"):
        if rank == 0:
            time.sleep(0.3)
        done = time.monotonic()
    group = dist.group.WORLD
    return (
        meeting.first("fault"),
        done,
        [*everyone((rank, rank**2), group), from_first("main" if not rank else 1, group)],
    )


def test_a_fault_of_the_main_one_is_not_waited_out() -> None:
    assert run_ranks(2, _fail) == [None, "another rank failed before 'data' was done"]


def _fail(rank: int) -> str | None:
    import torch.distributed as dist

    meeting = Meeting(dist.distributed_c10d._get_default_store())
    if rank == 0:
        assert meeting.first("failed")
        time.sleep(1)  # it holds the store
        return None
    try:
        with meeting.after("data", False, "failed"):
            return "it was done"
    except WorkerError as error:
        return str(error)
