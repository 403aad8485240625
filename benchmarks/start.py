"""How long from the command to its first token, beyond reading the weights' file?

    twofold bench start [--model DIR] [--turns N] [--quick] [--json FILE]

`twofold generate --max-tokens 1` in a new process each time, until its first byte can be read, with the checkpoint's
files in the system's memory and without; in turn with them `import torch` alone, the least that a start can take, and a
plain read of the files where they are not in memory. The kernels' library is used as it lies there, built.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from turns import Spread

from twofold.commands.model import model_dir

PIECE = 16 << 20
GOAL = 3.0  # seconds to the first token, beyond reading the file


def seconds_to_first_byte(command: list[str]) -> float:
    """Seconds from the process's start to the first byte of its output. Raises CalledProcessError when it fails."""
    start = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.read(1)
        took = time.perf_counter() - start
        process.stdout.read()
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return took


def forget(model: Path) -> None:
    """Ask the system to keep nothing of the checkpoint's files in its memory."""
    for path in model.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def seconds_to_read(model: Path) -> float:
    """Seconds to read the weights from the first byte to the last, and to keep nothing of them."""
    room = bytearray(PIECE)
    start = time.perf_counter()
    for path in sorted(model.glob("*.safetensors")):
        with path.open("rb", buffering=0) as file:
            while file.readinto(room):
                pass
    return time.perf_counter() - start


def measure(model: Path, turns: int) -> dict[str, list[float]]:
    """Seconds of every side, one list a side, turn by turn; a first turn is for the other files' sake."""
    python = [sys.executable, "-u"]
    ours = [*python, "-m", "twofold", "generate", "--model", str(model), "--prompt", "hello", "--max-tokens", "1"]
    seen: dict[str, list[float]] = {"torch": [], "read": [], "cold": [], "warm": []}
    for turn in range(turns + 1):
        once = {"torch": seconds_to_first_byte([*python, "-c", "import torch; print(torch.__version__)"])}
        forget(model)
        once["read"] = seconds_to_read(model)
        forget(model)
        once["cold"] = seconds_to_first_byte(ours)
        once["warm"] = seconds_to_first_byte(ours)
        for side, took in once.items():
            seen[side] += [took] if turn else []
    return seen


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
    parser.add_argument("--model", help="checkpoint directory (default: the bundled model)")
    parser.add_argument("--turns", type=int, default=5, help="new processes of each side (default: 5)")
    parser.add_argument("--quick", action="store_true", help="one turn: a smoke test")
    parser.add_argument("--json", type=Path, help="write the record to this file")
    args = parser.parse_args()
    model = model_dir(args.model)
    size = sum(path.stat().st_size for path in model.glob("*.safetensors"))
    print(f"{model}: {size / 2**20:,.0f} MiB of weights", flush=True)
    seen = measure(model, 1 if args.quick else args.turns)
    beyond = [cold - read for cold, read in zip(seen["cold"], seen["read"], strict=True)]
    for title, values in (
        ("import torch alone", seen["torch"]),
        ("first token, file in memory", seen["warm"]),
        ("first token, file on disk", seen["cold"]),
        ("reading that file alone", seen["read"]),
        ("first token beyond reading the file", beyond),
    ):
        print(f"{title:<36}{Spread.of(values).text('s', 2)}")
    print(f"{'as a share of the goal':<36}{Spread.of(beyond).median / GOAL:.2f} of {GOAL:.0f} s")
    if args.json:
        args.json.write_text(json.dumps({"model": model.name, "bytes": size} | seen, indent=1) + "\n")


if __name__ == "__main__":
    main()
