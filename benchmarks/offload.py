"""What does it cost to train with the run's state on disk, and how much memory does that leave?

    twofold bench offload [--quick] [--json FILE] [--directory DIR] [--threads N] [--turns N]

A random decoder trains some steps with everything in memory, then with more and more of it in mapped files: the
optimizer's states, gradients too, weights too, and at last without the system's cache, so that every step waits for the
disk. Each run is a process of its own, in turn A B C D E; all must tell the same losses and gradient norms, bit for
bit. Then a limit is set on the memory that the process may take, too small for the state: with everything in memory
the run must fail, with everything on disk it must tell the same numbers again.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import limits
import torch

from twofold.platforms import team_size
from twofold.platforms.host import HostPool

MIB = 1 << 20
DISK = {"optimizer": "disk", "gradients": "disk", "parameters": "disk"}
WAYS: dict[str, dict[str, Any]] = {
    "all in memory": {},
    "states on disk": {"optimizer": "disk"},
    "states, gradients": {"optimizer": "disk", "gradients": "disk"},
    "all on disk": DISK,
    "all, not cached": DISK | {"cache": False},
}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
    parser.add_argument("--quick", action="store_true", help="a small model and one turn: a smoke test")
    parser.add_argument("--json", type=Path, help="write the record to this file")
    parser.add_argument("--directory", type=Path, help="where the files are (default: the system's for temporary ones)")
    parser.add_argument("--threads", type=int, default=team_size(), help="threads of a run")
    parser.add_argument("--turns", type=int, default=3, help="how often each way runs (default: 3)")
    return parser.parse_args()


def run(how: dict[str, Any], way: str, limit: int = 0) -> dict[str, Any]:
    """One run in a process of its own."""
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("offload_run.py"))],
        input=json.dumps(how | {"offload": WAYS[way], "limit": limit}),
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": str(how["threads"])},
    )
    if done.returncode:
        raise SystemExit(f"the run '{way}' ended with status {done.returncode}")
    record: dict[str, Any] = json.loads(done.stdout)
    return record


def disk_speed(directory: Path, size: int) -> dict[str, float]:
    """MiB/s that the directory's disk is written and read at, past the system's cache."""
    with HostPool("disk", directory) as pool:
        room = pool.allocate({"a": ((size,), torch.uint8)})["a"]
        began = time.perf_counter()
        room.fill_(1)
        pool.drop()
        written = time.perf_counter()
        pool.bring(room).result()
        return {
            "write_mib_s": size / MIB / (written - began),
            "read_mib_s": size / MIB / (time.perf_counter() - written),
        }


def row(way: str, mine: list[dict[str, Any]], base: list[dict[str, Any]], state: int) -> dict[str, Any]:
    """Print one way's line, and give its record; the first step, which makes the states, is not timed."""
    times, updates = ([median(each[what][1:]) for each in mine] for what in ("seconds", "updates"))
    ratios = sorted(a / median(b["seconds"][1:]) for a, b in zip(times, base))
    most = {kind: max(each["most"][kind] for each in mine) for kind in ("anonymous", "file", "both")}
    same = all(each["told"] == base[0]["told"] for each in mine)
    spread = f"({ratios[0]:.2f} to {ratios[-1]:.2f})" if len(ratios) > 1 else ""
    print(
        f"{way:18} {median(times):7.3f} s a step, {median(updates):6.3f} of it the update: {median(ratios):5.2f} times "
        f"{spread}\n{'':18} "
        f"{most['both'] / MIB:7.0f} MiB at most: {most['anonymous'] / MIB:6.0f} its own, {most['file'] / MIB:5.0f} of "
        f"files; {most['both'] / state:4.0%} of the state{'' if same else '; OTHER NUMBERS'}",
        flush=True,
    )
    return {
        "seconds": times,
        "updates": updates,
        "ratio": median(ratios),
        "ratios": ratios,
        "most": most,
        "same_bits": same,
    }


def main() -> None:
    args = arguments()
    with tempfile.TemporaryDirectory(dir=args.directory, prefix="offload-") as folder:
        size = {"hidden": 384, "layers": 4, "steps": 3} if args.quick else {"hidden": 1024, "layers": 4, "steps": 5}
        how = size | {"tokens": 64 if args.quick else 512, "micro_batches": 2}
        how |= {"threads": args.threads, "directory": folder}
        machine = limits.measure(args.threads, quick=True)
        disk = disk_speed(Path(folder), (64 if args.quick else 512) * MIB)
        print(limits.line(machine))
        print(f"disk: {disk['write_mib_s']:,.0f} MiB/s written, {disk['read_mib_s']:,.0f} MiB/s read", flush=True)
        found: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
        for _ in range(1 if args.quick else args.turns):
            for way in WAYS:
                found[way].append(run(how, way))
        weights = found["all in memory"][0]["weights"]
        state = 16 * weights
        print(
            f"{weights / 1e6:.1f}M weights in fp32, {state / MIB:,.0f} MiB of weights, gradients and states (16 bytes "
            f"each); {how['tokens'] * how['micro_batches']} tokens a step, layers recomputed, {args.threads} threads"
        )
        rows = {way: row(way, found[way], found["all in memory"], state) for way in WAYS}
        record = {"limits": machine, "disk": disk, "weights": weights, "threads": args.threads, "ways": rows}
        record["limited"] = limited(how, state // 2, found["all in memory"][0]["told"])
    if args.json:
        args.json.write_text(json.dumps(record, indent=1) + "\n")
    if not (record["limited"]["same_bits"] and all(each["same_bits"] for each in rows.values())):
        raise SystemExit("a run told other numbers than the one in memory")


def limited(how: dict[str, Any], limit: int, told: Any) -> dict[str, Any]:
    """The same under a limit on the process's memory: what each of the two does."""
    memory, disk = run(how, "all in memory", limit), run(how, "all on disk", limit)
    same = disk.get("told") == told
    first = memory.get("lacked", "FITS, WHICH IT SHOULD NOT")
    second = "tells the same numbers" if same else disk.get("lacked", "tells OTHER NUMBERS")
    print(f"with {limit / MIB:,.0f} MiB that a run may take: all in memory: {first}; all on disk: {second}")
    return {"limit": limit, "in_memory": memory.get("lacked"), "same_bits": same and "lacked" in memory}


if __name__ == "__main__":
    main()
