"""What does each ZeRO stage keep on a rank, and what does it send? Measured on real ranks, beside the formulas.

    twofold bench zero [--quick] [--json FILE]

2 and 4 processes of this machine, joined by gloo, train a small Llama-shaped decoder with AdamW. Memory is the bytes of
all live tensors, op by op (`twofold/train/storages.py`): between steps, after the last backward pass, and the most at
once, beside the forecast (`twofold/train/forecast.py`). Volume is what collectives move, as numbers for each of the
model's Ψ numbers: a gather or a reduce-scatter of everything is Ψ, a sum of everything on all ranks 2Ψ. The formulas
are those of Rajbhandari et al. 2020: narrow weights and gradients, fp32 masters and two moments.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import socket
from pathlib import Path
from typing import Any

import torch

from twofold.data import Batch
from twofold.models import Decoder, ModelSpec, spec_from
from twofold.models.packed import PackedContext
from twofold.parallel import Layout, Mesh, ParallelConfig, Ranks, joined
from twofold.parallel.layout import lay_out
from twofold.train import loss as losses
from twofold.train.axes import Axes
from twofold.train.collectives import Collectives
from twofold.train.config import OptimizerConfig
from twofold.train.forecast import Cut, Load, memory
from twofold.train.init import init_weights
from twofold.train.optimizer import Optimizer
from twofold.train.policies import per_layer
from twofold.train.share import share
from twofold.train.storages import Storages
from twofold.train.zero import Zero

STAGES: tuple[Any, ...] = (0, 1, 2, 3, "hybrid")
FORMULAS = {0: "16Ψ", 1: "4Ψ+12Ψ/N", 2: "2Ψ+14Ψ/N", 3: "16Ψ/N"}
WIRE = {0: "2Ψ", 1: "2Ψ", 2: "2Ψ", 3: "3Ψ"}
COMMS: tuple[Any, ...] = ("plain", "int8", "int4", "onebit")
TOKENS, LENGTH, WARMUP = 64, 32, 10
MIB = 2**20


def shape(*, quick: bool) -> ModelSpec:
    hidden, layers = (128, 4) if quick else (256, 8)
    config: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": 11 * hidden // 4,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "vocab_size": 512,
    }
    return spec_from(config)


class Run:
    """A decoder in training on this rank."""

    def __init__(self, spec: ModelSpec, layout: Layout, rank: int, config: ParallelConfig, dtype: str) -> None:
        self.mesh, self.spec = Mesh(layout, rank), spec
        self.decoder = Decoder(spec)
        init_weights(self.decoder, 1)
        narrow = torch.bfloat16 if dtype == "bf16" else None
        self.zero = Zero(self.decoder, self.mesh, narrow, config=config)
        named = self.decoder.named_parameters()
        self.optimizer = Optimizer(named, OptimizerConfig(lr=3e-3), norm=Axes(self.mesh).norm)

    def batch(self, number: int, parts: int) -> Batch:
        """Sequences that count upwards from somewhere, in steps of one to three: there is something to learn."""
        source = torch.Generator().manual_seed(number % 8)
        count = parts * self.mesh.size("data") * TOKENS // LENGTH
        first, step = (torch.randint(low, high, (count, 1), generator=source) for low, high in ((0, 512), (1, 4)))
        ids = ((first + step * torch.arange(LENGTH)) % self.spec.vocab).flatten()
        return Batch(ids_T=ids, targets_T=ids.roll(-1), lengths=(LENGTH,) * count)

    def backward(self, number: int, parts: int) -> float:
        """Forward and backward over this rank's share; the step's mean loss."""
        batch = self.batch(number, parts)
        mine = share(batch, self.mesh.size("data"), self.mesh.rank("data"), TOKENS)
        summed, targets = 0.0, len(batch.ids_T)
        for at, part in enumerate(mine, 1):
            self.zero.micro_batch(last=at == len(mine))
            hidden_TD = self.decoder(part.ids_T, PackedContext(part.lengths))
            summed += losses.backward(self.decoder, hidden_TD, part.targets_T, targets, self.spec.vocab)
        return self.mesh.sum("loss", summed)[0] / targets

    def update(self) -> None:
        self.optimizer.clip()
        self.optimizer.step(3e-3)
        self.optimizer.zero()


def measure(rank: int, spec: ModelSpec, layout: Layout, config: ParallelConfig, dtype: str) -> dict[str, Any]:
    """One stage's record on this rank."""
    record: dict[str, Any] = {"ranks": layout.world, "zero": config.zero, "dtype": dtype}
    with Storages() as alive:
        run = Run(spec, layout, rank, config, dtype)
        peaks = []
        for step in range(4):  # gloo's own thread may hold a buffer a moment longer, so the least of some peaks
            with alive.during() as peak:
                run.backward(step, 1)
                record["after_backward"] = alive.now()
                run.update()
            peaks += peak
        record |= {"peak": min(peaks[1:]), "kept": alive.now()}
    for parts in (1, 4):
        with Collectives() as said:
            run.backward(2, parts)
        run.optimizer.zero()
        ring = sum(total.sent * total.ranks / (total.ranks - 1) for total in said.found.values() if total.ranks > 1)
        record[f"volume_{parts}"] = ring / (2 if dtype == "bf16" else 4)
        record[f"sent_{parts}"] = sum(total.sent for total in said.found.values())
        record[f"calls_{parts}"] = {name: total.bytes for (name, _), total in said.found.items()}
    return record


def converge(rank: int, spec: ModelSpec, layout: Layout, config: ParallelConfig, steps: int) -> dict[str, Any]:
    """Bytes that this rank sends in a step, and the loss after `steps`."""
    run, curve = Run(spec, layout, rank, config, "fp32"), []
    for step in range(steps):
        with Collectives() as said:
            curve.append(run.backward(step, 1))
        run.update()
    sent = sum(total.sent for total in said.found.values())
    return {"comm": config.comm, "zero": config.zero, "sent": sent, "first": curve[0], "loss": sum(curve[-8:]) / 8}


def work(rank: int, world: int, port: int, quick: bool, answers: Any) -> None:
    """One rank: every stage, then (of two ranks) every way to send."""
    torch.set_num_threads(1)
    spec, found = shape(quick=quick), []
    with joined(Ranks(rank=rank, world=world, local_rank=rank, local_world=world, port=port), timeout=300):
        for dtype in ("fp32", "bf16"):
            for zero in STAGES if world > 2 else STAGES[:-1]:
                config = ParallelConfig(zero=zero, node=2)
                found.append(measure(rank, spec, lay_out(config, world), config, dtype))
        for comm in COMMS if world == 2 else ():
            config = ParallelConfig(zero=2, comm=comm, comm_warmup=WARMUP)
            found.append(converge(rank, spec, lay_out(config, world), config, 40 if quick else 200))
    if rank == 0:
        answers.put(found)


def start(world: int, quick: bool) -> list[dict[str, Any]]:
    """Records of rank 0, which holds the most."""
    processes = multiprocessing.get_context("spawn")
    answers = processes.SimpleQueue()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = [processes.Process(target=work, args=(rank, world, port, quick, answers)) for rank in range(world)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    if any(process.exitcode for process in ranks):
        raise SystemExit(f"a rank of {world} failed: see above")
    found: list[dict[str, Any]] = answers.get()
    return found


def numbers(spec: ModelSpec) -> int:
    return sum(math.prod(p.shape) for p in Decoder(spec, device="meta").parameters())


def add_formulas(record: dict[str, Any], spec: ModelSpec) -> None:
    """The paper's bytes, ours between steps and after the backward pass, and the forecast of the peak."""
    count, ranks = numbers(spec), record["ranks"]
    layout = lay_out(ParallelConfig(zero=record["zero"], node=2), ranks)
    among = layout.zero
    record["formula"] = {0: 16.0, 1: 4 + 12 / ranks, 2: 2 + 14 / ranks, 3: 16 / among}[layout.stage] * count
    record["ours_kept"], record["ours_after"] = 12 * count / among, 16 * count / among
    size = 2 if record["dtype"] == "bf16" else 4
    load = Load(tokens=TOKENS, size=size, policies=tuple(per_layer("none", len(spec.layers))))
    said = memory(spec, Cut.of(layout, in_place=size == 4), load)
    record["forecast_peak"], record["gathered"] = said.peak.total, said.peak.gathered


def report(records: list[dict[str, Any]], spec: ModelSpec) -> None:
    count = numbers(spec)
    print(
        "ranks zero   dtype  formula           MiB   kept  ours  after bw  ours   peak  forecast  volume of 1  4 parts"
    )
    for r in records:
        if "comm" in r:
            continue
        stage = 3 if r["zero"] == "hybrid" else r["zero"]
        said = "16Ψ/node" if r["zero"] == "hybrid" else FORMULAS[stage]
        mib = {key: r[key] / MIB for key in ("formula", "kept", "ours_kept", "after_backward", "ours_after", "peak")}
        print(
            f"{r['ranks']:>5} {r['zero']!s:<6} {r['dtype']:<6} {said:<10} {mib['formula']:>10.2f} {mib['kept']:>6.2f} "
            f"{mib['ours_kept']:>5.2f} {mib['after_backward']:>9.2f} {mib['ours_after']:>5.2f} {mib['peak']:>6.2f} "
            f"{r['forecast_peak'] / r['peak']:>9.1%} {r['volume_1'] / count:>10.2f}Ψ {r['volume_4'] / count:>6.2f}Ψ  "
            f"({WIRE[stage]})"
        )
    print("\ncomm    sent MiB a step   of plain   loss of the first step   of the last eight")
    plain = next(r["sent"] for r in records if r.get("comm") == "plain")
    for r in (r for r in records if "comm" in r):
        print(
            f"{r['comm']:<7} {r['sent'] / MIB:>15.3f} {r['sent'] / plain:>10.1%} {r['first']:>24.4f} {r['loss']:>19.4f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
    parser.add_argument("--quick", action="store_true", help="a small shape and few steps: under a minute")
    parser.add_argument("--json", type=Path, help="write the record to this file")
    args = parser.parse_args()
    spec = shape(quick=args.quick)
    print(f"Ψ = {numbers(spec):,}; {TOKENS} tokens a micro-batch; MiB of rank 0, which holds the most\n")
    records = [record for world in (2, 4) for record in start(world, args.quick)]
    for record in records:
        if "comm" not in record:
            add_formulas(record, spec)
    report(records, spec)
    if args.json:
        args.json.write_text(json.dumps(records, indent=1) + "\n")


if __name__ == "__main__":
    main()
