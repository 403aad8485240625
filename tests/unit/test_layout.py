"""Where each rank stands, and what is refused."""

from __future__ import annotations

import pytest

from twofold.core import ConfigError
from twofold.parallel import Layout, ParallelConfig, discover
from twofold.parallel.layout import lay_out
from twofold.parallel.ranks import first_host


def test_groups_of_eight() -> None:
    layout = Layout(pp=2, shard=2, tp=2)
    assert layout.groups("tp") == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert layout.groups("zero") == [[0, 2], [1, 3], [4, 6], [5, 7]]
    assert layout.groups("pp") == [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert layout.groups("loss") == [[0, 2, 4, 6], [1, 3, 5, 7]]
    assert layout.groups("norm") == [list(range(8))]
    assert layout.place(5, "pp") == 1 and layout.place(5, "tp") == 1 and layout.place(5, "shard") == 0


def test_experts_are_the_inner_part_of_zero() -> None:
    layout = Layout(replicate=2, shard=4, ep=2)
    assert layout.groups("ep") == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert layout.groups("edp") == [[0, 2], [1, 3], [4, 6], [5, 7]]
    assert layout.groups("norm") == [[0, 1, 2, 3], [4, 5, 6, 7]]


@pytest.mark.parametrize("axis", ["pp", "replicate", "shard", "sp", "tp", "data", "zero", "ep", "edp", "loss", "norm"])
def test_groups_hold_every_rank_once(axis) -> None:
    layout = Layout(pp=2, replicate=2, shard=2, sp=2, tp=2, ep=2)
    groups = layout.groups(axis)
    assert sorted(rank for group in groups for rank in group) == list(range(32))
    assert {len(group) for group in groups} == {layout.size(axis)}


def test_auto_takes_what_is_left_and_says_why() -> None:
    layout = lay_out(ParallelConfig(tp=2), 8)
    assert (layout.shard, layout.tp, layout.stage) == (4, 2, 2)
    assert "ZeRO 2" in layout.why[0]
    assert lay_out(ParallelConfig(), 1).stage == 0
    assert lay_out(ParallelConfig(zero=0), 4) == Layout(replicate=4)
    assert lay_out(ParallelConfig(zero="hybrid"), 8, node=4) == Layout(replicate=2, shard=4, stage=3)


@pytest.mark.parametrize(
    "config, world, said",
    [
        (ParallelConfig(tp=3), 4, "start 3 ranks"),
        (ParallelConfig(dp=3), 4, 'set dp = 4 or "auto"'),
        (ParallelConfig(ep=3), 4, r"ep must divide them \(here 2\)"),
        (ParallelConfig(zero="hybrid"), 4, "needs parallel.node"),
        (ParallelConfig(zero="hybrid", node=3), 4, "set parallel.node to 2"),
    ],
)
def test_an_illegal_mesh_names_the_nearest(config: ParallelConfig, world: int, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        lay_out(config, world)


def test_launchers() -> None:
    assert discover({}).launcher == "none"
    found = discover({"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "a"})
    assert (found.rank, found.world, found.local_rank, found.local_world, found.address) == (3, 8, 1, 2, "a")
    slurm = {
        "SLURM_STEP_ID": "0", "SLURM_JOB_ID": "77", "SLURM_PROCID": "5", "SLURM_NTASKS": "7", "SLURM_LOCALID": "1",
        "SLURM_NODEID": "1", "SLURM_STEP_NODELIST": "gpu[03-04,9]", "SLURM_STEP_TASKS_PER_NODE": "3(x2),1",
    }  # fmt: skip
    found = discover(slurm)
    assert (found.rank, found.world, found.local_world, found.address, found.port) == (5, 7, 3, "gpu03", 20077)
    found = discover({"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2"})
    assert (found.rank, found.world, found.launcher) == (1, 2, "Open MPI")
    with pytest.raises(ConfigError, match="export MASTER_ADDR"):
        discover({"PMI_RANK": "1", "PMI_SIZE": "4", "MPI_LOCALNRANKS": "2"})
    with pytest.raises(ConfigError, match="WORLD_SIZE must be a whole number, not 'two'"):
        discover({"RANK": "1", "WORLD_SIZE": "two"})
    with pytest.raises(ConfigError, match="rank 4 of 4"):
        discover({"RANK": "4", "WORLD_SIZE": "4"})


def test_the_first_host() -> None:
    assert first_host("gpu[03-07,12],cpu1") == "gpu03"
    assert first_host("a1,b2") == "a1"
    assert first_host("rack[1-2]node") == "rack1node"
