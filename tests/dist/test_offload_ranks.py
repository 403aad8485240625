"""Under FSDP2 each rank keeps its own slices elsewhere: states, gradients, weights on disk change no bit."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

PROGRAM = """
import sys
from pathlib import Path
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from test_offload import IDS, spec, step
from twofold.models.decoder import Decoder
from twofold.models.layout import matrices
from twofold.train.config import OptimizerConfig
from twofold.train.init import init_weights
from twofold.train.offload import Offload
from twofold.train.offload_config import OffloadConfig
from twofold.train.optimizer import Optimizer
from twofold.train.recompute import recompute_layers
from twofold.train.zero import local

rank, folder = int(sys.argv[1]), Path(sys.argv[2])
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
mesh = init_device_mesh("cpu", (2,))

def norm(squares):
    summed = torch.tensor(sum(squares.values()), dtype=torch.float64)
    dist.all_reduce(summed)
    return float(summed.sqrt())

def run(offload):
    decoder = Decoder(spec(tied=False))
    init_weights(decoder, 3)
    recompute_layers(decoder)
    for module in (*decoder.layers, decoder):
        fully_shard(module, mesh=mesh)
        module.set_force_sum_reduction_for_comms(True)
        module.set_gradient_divide_factor(1.0)
    offload.move_weights(decoder)
    config = OptimizerConfig(lr=0.01, clip=0.5)
    optimizer = Optimizer(decoder.named_parameters(), config, matrices=matrices(decoder), norm=norm, offload=offload)
    told = [step(decoder, optimizer) for _ in range(3)]
    assert all(p.grad is None for p in decoder.parameters())
    weights = {name: local(p.detach()) for name, p in decoder.named_parameters()}
    return torch.tensor(told, dtype=torch.float64), weights | optimizer.state()

told, one = run(Offload())
numbers = sum(p.numel() for p in Decoder(spec(tied=False), device="meta").parameters())
for bytes_each, places in ((12, {}), (16, {"parameters": "disk"})):
    disk = Offload(OffloadConfig(optimizer="disk", gradients="disk", tile=1 << 20, **places), folder)
    again, other = run(disk)
    assert torch.equal(told, again), (told, again)
    assert one.keys() == other.keys() and all(torch.equal(x, other[name]) for name, x in one.items())
    assert 0.5 <= disk._pools["disk"].nbytes / (bytes_each * numbers) < 0.7, "slices, not whole tensors"
    mine = [name for name in other if name.endswith("weight") and not name.startswith("step.")]
    kept = [disk._pools["disk"].holds(other[name]) for name in mine]
    assert all(kept) if places else not all(kept), "FSDP2 took up the weights that lie in files"
print("same", flush=True)
dist.destroy_process_group()
"""


def test_two_ranks_keep_their_slices_on_disk(tmp_path: Path) -> None:
    unit = str(Path(__file__).resolve().parents[1] / "unit")
    path = os.pathsep.join(filter(None, [unit, *sys.path]))
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(rank), str(tmp_path)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
        )
        for rank in range(2)
    ]
    said = [rank.communicate(timeout=120)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(said)
    assert all(text.endswith("same\n") for text in said)
