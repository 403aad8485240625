"""One run of offload.py, in a process of its own: trains a random decoder some steps, and says what it took.

Reads a JSON object from standard input, writes one to standard output: the losses, the seconds of each step and of its
norm and update, and the most memory that was resident above what the libraries took, by kind. `limit` bounds what the
process may take after them.
"""

from __future__ import annotations

import json
import resource
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # imported by torch's checkpoint at its first call: not what is measured

from twofold.core import TwofoldError
from twofold.core.config import build
from twofold.models.decoder import Decoder
from twofold.models.packed import PackedContext
from twofold.models.spec import Attention, Gated, Head, LayerSpec, ModelSpec, Names, Norm, Pre, Rope
from twofold.platforms.memory import shortage
from twofold.train import loss as losses
from twofold.train.config import OptimizerConfig
from twofold.train.init import init_weights
from twofold.train.offload import Offload
from twofold.train.offload_config import OffloadConfig
from twofold.train.optimizer import Optimizer
from twofold.train.recompute import recompute_layers

VOCAB = 8192


class Watch:
    """Looks at this process's resident pages every few milliseconds: its own (anonymous) and those of files."""

    def __init__(self) -> None:
        self.base = self.seen()
        self.most = {"anonymous": 0, "file": 0, "both": 0}
        threading.Thread(target=self._look, daemon=True).start()

    @staticmethod
    def seen() -> dict[str, int]:
        found = field("RssAnon", "RssFile")
        return {"anonymous": found[0], "file": found[1], "both": sum(found)}

    def _look(self) -> None:
        while True:
            for kind, size in self.seen().items():
                self.most[kind] = max(self.most[kind], size - self.base[kind])
            time.sleep(0.004)


def field(*names: str) -> list[int]:
    """Fields of this process's status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    status = {line.partition(":")[0]: line.split() for line in lines}
    return [int(status[name][1]) * 1024 for name in names]


def spec(hidden: int, layers: int) -> ModelSpec:
    mixer = Attention(heads=hidden // 64, kv_heads=hidden // 64, head_dim=64, position=Rope(theta=1e4, dim=64))
    norm = Norm(kind="rms", eps=1e-6)
    layer = LayerSpec(mixer=mixer, ffn=Gated(width=hidden * 11 // 4, act="silu"), norms=Pre(norm=norm))
    return ModelSpec(
        architecture="Random",
        hidden=hidden,
        vocab=VOCAB,
        layers=(layer,) * layers,
        norm=norm,
        head=Head(tied=True),
        names=Names(table={}),
        max_len=4096,
    )


def train(how: dict[str, Any], watch: Watch) -> dict[str, Any]:
    """The run itself."""
    offload = Offload(build(OffloadConfig, how["offload"]), Path(how["directory"]))
    model = spec(how["hidden"], how["layers"])
    decoder = Decoder(model, device="meta" if offload.keeps_weights else "cpu")
    if offload.keeps_weights:
        offload.place_weights(decoder)
    init_weights(decoder, 0, offload.let_go)
    recompute_layers(decoder)
    optimizer = Optimizer(decoder.named_parameters(), OptimizerConfig(), offload=offload)
    generator = torch.Generator().manual_seed(1)
    told, seconds, updates = [], [], []
    for _ in range(how["steps"]):
        began = time.perf_counter()
        summed = 0.0
        for _ in range(how["micro_batches"]):
            ids = torch.randint(VOCAB, (how["tokens"],), generator=generator)
            hidden_TD = decoder(ids, PackedContext([len(ids)]))
            total = how["tokens"] * how["micro_batches"]
            summed += losses.backward(decoder, hidden_TD, ids.roll(-1), total, VOCAB)
            optimizer.collect()
        due = time.perf_counter()
        norm = optimizer.clip()
        optimizer.step(1e-3)
        optimizer.zero()
        offload.settle()
        seconds.append(time.perf_counter() - began)
        updates.append(time.perf_counter() - due)
        told.append([summed, norm])
    weights = sum(p.numel() for p in decoder.parameters())
    return {"told": told, "seconds": seconds, "updates": updates, "weights": weights, "most": dict(watch.most)}


def main() -> None:
    how = json.loads(sys.stdin.read())
    torch.set_num_threads(how["threads"])
    torch.mm(torch.ones(256, 256), torch.ones(256, 256))  # the threads are there
    watch = Watch()
    if how["limit"]:
        most = field("VmData")[0] + how["limit"]
        resource.setrlimit(resource.RLIMIT_DATA, (most, most))
    try:
        record = train(how, watch)
    except (TwofoldError, MemoryError, RuntimeError) as error:
        lacked = shortage(error)
        if lacked is None:
            raise
        record = {"lacked": lacked}
    json.dump(record, sys.stdout)


if __name__ == "__main__":
    main()
