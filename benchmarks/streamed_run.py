"""One run of streamed.py, in a process of its own: a batch of requests, with a limit on its memory or without.

Reads a JSON object from standard input, writes one to standard output: seconds, bytes read, what the disk gives, and
the tokens with their log-probabilities; or `lacked`, what memory could not be had.
"""

from __future__ import annotations

import json
import resource
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch

from twofold.core import CapacityError
from twofold.engine.llm import LLM
from twofold.engine.sampling import SamplingParams
from twofold.kernels import native
from twofold.models.decoder import Decoder
from twofold.models.sections import sections
from twofold.models.streaming import PIECE, least_bytes
from twofold.models.weights import read_spec
from twofold.platforms.direct import Direct, cached, room
from twofold.platforms.memory import shortage

REQUESTS = 64
STACK = 512 << 10
"""Of each thread that Python starts: the limit counts what is reserved, and by default that is 8 MiB."""


def private() -> int:
    """Bytes that RLIMIT_DATA counts of this process."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmData"].split()[0]) * 1024


class Most:
    """The most that was seen beyond a base."""

    def __init__(self, base: int) -> None:
        self.base, self.most = base, 0
        threading.Thread(target=self._look, daemon=True).start()

    def _look(self) -> None:
        while True:
            self.most = max(self.most, private() - self.base)
            time.sleep(0.005)


def bandwidth(file: Direct) -> tuple[float, str]:
    """Bytes a second that a file is read at, whole, by the number of threads that is best at it."""
    best, way = 0.0, ""
    for threads in (1, 2, 4):
        rooms = [room(PIECE).numpy().data for _ in range(threads)]
        for _ in range(2):
            began = time.perf_counter()
            with ThreadPoolExecutor(threads) as pool:
                list(pool.map(partial(_read, file, rooms), range(threads)))
            rate = file.size / (time.perf_counter() - began)
            if rate > best:
                best, way = rate, f"by {threads} threads, {'O_DIRECT' if file.past_cache else 'cache dropped'}"
    return best, way


def _read(file: Direct, rooms: list[memoryview], number: int) -> None:
    for at in range(number * PIECE, file.size, len(rooms) * PIECE):
        file.read(at, rooms[number][: min(PIECE, file.size - at)])


def settings(how: dict[str, Any]) -> dict[str, Any]:
    """The engine's: a cache for just this batch, and layers in half of what the limit leaves."""
    spec, block = read_spec(how["model"]), 16
    blocks = REQUESTS * -(-(how["prompt"] + how["new"]) // block)
    found = {"dtype": how["dtype"], "num_blocks": blocks, "max_num_seqs": REQUESTS, "max_num_batched_tokens": 256}
    found |= {"max_model_len": how["prompt"] + how["new"], "kv_dtype": "bfloat16", "enable_prefix_caching": False}
    if how["weights"] == "stream":
        layers = sections(Decoder(spec, dtype=getattr(torch, how["dtype"]), device="meta"))
        budget = max(least_bytes(layers), how["limit"] // 2)
        found |= {"weights": "stream", "weights_memory_bytes": budget, "offload_dir": how["offload"]}
    return found


def serve(how: dict[str, Any], seen: Most) -> dict[str, Any]:
    """The run itself."""
    llm = LLM(how["model"], **settings(how))
    stream = llm.engine.decoder.stream
    prompts = [[1 + (n * 31 + i * 7) % 1000 for i in range(how["prompt"])] for n in range(REQUESTS)]
    params = SamplingParams(temperature=0.0, max_tokens=how["new"], ignore_eos=True, logprobs=0)
    llm.generate(prompts[:1], params.with_(max_tokens=1), progress=False)  # pages of the program are touched once
    rows, told = [], None
    for count in how["batches"]:
        row: dict[str, Any] = {"requests": count, "tokens": count * how["new"], "seconds": [], "read": [], "waited": []}
        row["steps"] = []
        for _ in range(how["turns"]):
            before = (stream.readers.read_bytes, stream.readers.waited_seconds) if stream else (0, 0.0)
            began, steps = time.perf_counter(), llm.engine.stats().steps
            answers = llm.generate(prompts[:count], params, progress=False)
            row["seconds"].append(time.perf_counter() - began)
            row["steps"].append(llm.engine.stats().steps - steps)
            if stream:
                row["read"].append(stream.readers.read_bytes - before[0])
                row["waited"].append(stream.readers.waited_seconds - before[1])
            told = [[(t.id, t.logprob) for t in answer.outputs[0].logprobs or ()] for answer in answers]
        rows.append(row)
    found = {"batches": rows, "told": told, "private": seen.most}
    if stream:
        resource.setrlimit(resource.RLIMIT_DATA, (resource.RLIM_INFINITY,) * 2)  # what follows is the measuring
        disk, way = bandwidth(stream.file)
        found |= {"disk": disk, "way": way, "kept": len(stream.kept), "layers": len(llm.engine.decoder.layers)}
        found |= {"cached": cached(stream.file.path), "past_cache": stream.file.past_cache}
    return found


def main() -> None:
    how = json.loads(sys.stdin.read())
    threading.stack_size(STACK)
    torch.mm(torch.ones(256, 256), torch.ones(256, 256))
    if (kernels := native.library()) is not None:
        kernels.run([], torch.get_num_threads())  # all threads are there, torch's and the kernels'
    base = private()
    seen = Most(base)
    if how["limit"]:
        resource.setrlimit(resource.RLIMIT_DATA, (base + how["limit"], resource.RLIM_INFINITY))
    try:
        record = serve(how, seen)
    except (CapacityError, MemoryError, RuntimeError) as error:
        lacked = shortage(error)
        if lacked is None:
            raise
        record = {"lacked": lacked}
    json.dump(record, sys.stdout)


if __name__ == "__main__":
    main()
