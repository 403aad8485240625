"""The peers: plain PyTorch around transformers' model, a rank of it, by DistributedDataParallel or by FSDP2.

    python benchmarks/peers/train_torch.py --model DIR --threads N --length L --micro B --engine ddp|fsdp2

As their own pages show them: DDP with gradients that are views of its buckets, FSDP2 a group for each layer and one for
the rest. Needs torch and transformers.
"""

from __future__ import annotations

from typing import Any

from protocol import Channel
from training import CLIP, Turns, arguments, causal_model, mine, optimizer, place, versions


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--engine", required=True, choices=("ddp", "fsdp2"))
    args = parser.parse_args()
    turns = Turns(Channel())

    import torch

    torch.distributed.init_process_group("gloo")
    model = causal_model(args)
    model = replicated(model) if args.engine == "ddp" else sharded(model)
    rule = optimizer(model)
    turns.ready(f"{args.engine}, {versions('torch', 'transformers')}")
    while turns.wanted():
        ids = mine(args, turns.step)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        rule.step()
        rule.zero_grad(set_to_none=args.engine != "ddp")
        turns.done(float(loss.detach()))
    torch.distributed.destroy_process_group()


def replicated(model: Any) -> Any:
    """DDP where there is anybody to agree with."""
    from torch.nn.parallel import DistributedDataParallel

    return DistributedDataParallel(model, gradient_as_bucket_view=True) if place()[1] > 1 else model


def sharded(model: Any) -> Any:
    """FSDP2 over all ranks, parameters gathered for each layer and let go behind it."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (place()[1],))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


if __name__ == "__main__":
    main()
