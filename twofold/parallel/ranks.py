"""Ranks: who this process is among the others, and joining them.

A launcher says so in the environment, each in its own words; the first that speaks is believed:

    torchrun             RANK  WORLD_SIZE  LOCAL_RANK  MASTER_ADDR  MASTER_PORT
    Slurm (srun)         SLURM_PROCID  SLURM_NTASKS  SLURM_LOCALID  SLURM_STEP_NODELIST
    Open MPI             OMPI_COMM_WORLD_RANK ...
    MPICH, Intel MPI     PMI_RANK  PMI_SIZE  MPI_LOCALRANKID
    nobody               one process
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from ..core import ConfigError, WorkerError
from .roll import call_roll

PORT = 29500
LOOPBACK = "127.0.0.1"
LINGER = 1.5
"""Seconds that a failing rank keeps the store it holds, for the others to ask who failed first."""
NOTES = 2000
"""Collectives that a rank remembers (`watch.py`)."""
_OPEN = "OMPI_COMM_WORLD"
MPI = {
    "Open MPI": (f"{_OPEN}_RANK", f"{_OPEN}_SIZE", f"{_OPEN}_LOCAL_RANK", f"{_OPEN}_LOCAL_SIZE"),
    "MPI": ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
}
"""What each says of a rank, the number of ranks, and the same on its machine."""


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """This process's number among `world`, and among the `local_world` of its machine; where they meet."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1
    address: str = LOOPBACK
    port: int = PORT
    attempt: int = 0
    """How often torchrun has started this run again."""
    agent: bool = False
    """Whether torchrun's agent holds the store where ranks meet; else rank 0 does."""
    launcher: str = "none"

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world:
            raise ConfigError(f"{self.launcher} says this is rank {self.rank} of {self.world}, which cannot be")

    @property
    def main(self) -> bool:
        """Whether this is the one that speaks for all."""
        return self.rank == 0


def discover(env: Mapping[str, str] = os.environ) -> Ranks:
    """Read the environment.

    Raises:
        ConfigError: a launcher speaks, but not clearly; the variable is named.
    """
    if "RANK" in env and "WORLD_SIZE" in env:
        return _torchrun(env)
    if "SLURM_STEP_ID" in env and int(env.get("SLURM_NTASKS", "1")) > 1:
        return _slurm(env)
    for launcher, names in MPI.items():
        if names[0] in env:
            return _mpi(env, launcher, *names)
    return Ranks()


def _torchrun(env: Mapping[str, str]) -> Ranks:
    rank, world = _number(env, "RANK"), _number(env, "WORLD_SIZE")
    return Ranks(
        rank=rank,
        world=world,
        local_rank=_number(env, "LOCAL_RANK", rank),
        local_world=_number(env, "LOCAL_WORLD_SIZE", world),
        address=env.get("MASTER_ADDR", LOOPBACK),
        port=_number(env, "MASTER_PORT", PORT),
        attempt=_number(env, "TORCHELASTIC_RESTART_COUNT", 0),
        agent=env.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        launcher="torchrun",
    )


def _slurm(env: Mapping[str, str]) -> Ranks:
    nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST", "")
    tasks = env.get("SLURM_STEP_TASKS_PER_NODE") or env.get("SLURM_TASKS_PER_NODE", "")
    world, node = _number(env, "SLURM_NTASKS"), _number(env, "SLURM_NODEID", 0)
    counts = [int(n) for n, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", tasks) for _ in range(int(times or 1))]
    return Ranks(
        rank=_number(env, "SLURM_PROCID"),
        world=world,
        local_rank=_number(env, "SLURM_LOCALID", 0),
        local_world=counts[node] if node < len(counts) else world,
        address=env.get("MASTER_ADDR") or first_host(nodes) or LOOPBACK,
        port=_number(env, "MASTER_PORT", 20000 + _number(env, "SLURM_JOB_ID", 0) % 20000),
        launcher="Slurm",
    )


def _mpi(env: Mapping[str, str], launcher: str, rank: str, world: str, local_rank: str, local_world: str) -> Ranks:
    size = _number(env, world)
    local = _number(env, local_world, size)
    if local < size and "MASTER_ADDR" not in env:
        raise ConfigError(
            f"{launcher} started {size} ranks on several machines, and nothing says where they meet: export "
            "MASTER_ADDR (the host of rank 0) and MASTER_PORT, e.g. mpirun -x MASTER_ADDR=host0"
        )
    return Ranks(
        rank=_number(env, rank),
        world=size,
        local_rank=_number(env, local_rank, _number(env, rank) % local),
        local_world=local,
        address=env.get("MASTER_ADDR", LOOPBACK),
        port=_number(env, "MASTER_PORT", PORT),
        launcher=launcher,
    )


def first_host(nodes: str) -> str:
    """The first name of Slurm's list: "gpu[03-07,12],cpu1" begins with gpu03."""
    if found := re.match(r"([^\[,]+)\[([^\],-]+)[^\]]*\]([^,\[]*)", nodes):
        return "".join(found.groups())
    return nodes.split(",", 1)[0]


def _number(env: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = env.get(name)
    if text is None and default is not None:
        return default
    try:
        return int(text or "")
    except ValueError:
        raise ConfigError(f"the environment's {name} must be a whole number, not {text!r}") from None


class Meeting:
    """The store where ranks met, for what cannot wait in a collective. Alone there is none, and nobody to wait for."""

    POLL = 0.1

    def __init__(self, store: Any = None) -> None:
        self._store = store

    def first(self, what: str) -> bool:
        """Whether this rank is the first to say `what`; when nobody can be asked any more, it is."""
        try:
            return self._store is None or self._store.add(what, 1) == 1
        except RuntimeError:
            return True

    @contextmanager
    def after(self, what: str, main: bool, fault: str) -> Iterator[None]:
        """Inside, first the main rank alone, then all others, however long it takes.

        Raises:
            WorkerError: somebody said `fault` meanwhile.
        """
        while self._store is not None and not main and not self._store.check([what]):
            if self._store.check([fault]):
                raise WorkerError(f"another rank failed before '{what}' was done")
            time.sleep(self.POLL)
        yield
        if self._store is not None and main:
            self._store.set(what, "done")


@contextmanager
def joined(ranks: Ranks, device: str = "cpu", timeout: float = 600.0) -> Iterator[Meeting]:
    """Meet the other ranks, and part from them at the end. Alone, nothing happens.

    Each attempt of an elastic run meets under a name of its own (`roll.py`): torchrun hands every attempt the same
    store, where gloo would find the addresses of the dead. torch's flight recorder notes the collectives of all.

    Raises:
        WorkerError: some did not come in time.
    """
    if ranks.world == 1:
        yield Meeting()
        return
    import torch.distributed as dist

    try:
        store = _meet(ranks, device, timeout)
    except RuntimeError as error:
        if "EADDRINUSE" in str(error):
            raise WorkerError(
                f"port {ranks.port} of {ranks.address} is taken by another process: give another one (MASTER_PORT, or "
                "torchrun's --master-port)"
            ) from None
        raise WorkerError(
            f"rank {ranks.rank} of {ranks.world} waited {timeout:.0f} s at {ranks.address}:{ranks.port}, and not all "
            f"the others came: see what they said, or raise parallel.timeout ({str(error).splitlines()[0]})"
        ) from None
    try:
        yield Meeting(store)
    except BaseException:
        dist.destroy_process_group()
        if ranks.main and not ranks.agent:
            time.sleep(LINGER)
        raise
    dist.destroy_process_group()


def _meet(ranks: Ranks, device: str, timeout: float) -> Any:
    """Join the others; the store where they met."""
    import torch
    import torch.distributed as dist

    limit = timedelta(seconds=timeout)
    if ranks.local_world == ranks.world:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", str(NOTES))
    options: dict[str, Any] = {"timeout": limit}
    if not ranks.agent:
        options |= {"world_size": ranks.world, "is_master": ranks.main}
    meeting = dist.TCPStore(ranks.address, ranks.port, **options)  # type: ignore[attr-defined]
    name = call_roll(meeting, ranks.rank, ranks.world, timeout)
    store = dist.PrefixStore(name, meeting)  # type: ignore[attr-defined]
    if device == "cuda":
        torch.cuda.set_device(ranks.local_rank)
    dist.init_process_group(
        backend="cpu:gloo,cuda:nccl" if device == "cuda" else "gloo",
        store=store,
        rank=ranks.rank,
        world_size=ranks.world,
        timeout=limit,
    )
    return store
