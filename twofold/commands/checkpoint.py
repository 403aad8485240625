"""`twofold checkpoint`: look at a run's checkpoints, prove them whole, and make plain models of them."""

from __future__ import annotations

import time
from pathlib import Path

import torch
from torch import Tensor

from ..core import CheckpointError, ConfigError, unknown
from ..models import peft
from ..models.lora import merge
from ..models.scoring import CAUSAL, as_reward
from ..models.shards import write_shard
from ..models.weights import load, read_config, save
from ..models.whole import WholeParameters
from ..train import card
from ..train.checkpoint import MANIFEST, Checkpoints, check, damage, read_position, replace_directory
from ..train.files import TOKENIZER_FILES, ModelFiles, copy_files
from ..train.journal import read_rows
from ..train.pieces import Stored
from ..train.state import MASTER
from .bytes import human

ACTIONS = ("verify", "list", "export")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def checkpoint(action: str, directory: Path, output: str | None, dtype: str | None) -> int:
    """One of ACTIONS on a checkpoint, or on the directory of a run; exit code 0, or an error."""
    if action == "export":
        if output is None:
            raise ConfigError("twofold checkpoint export needs --output, the directory to write the model to")
        if dtype is not None and dtype not in DTYPES:
            raise ConfigError("--dtype: " + unknown("dtype", dtype, DTYPES))
        return export(directory, Path(output), dtype)
    if output is not None or dtype is not None:
        raise ConfigError(f"--output and --dtype are for export, not for {action}")
    return verify(directory) if action == "verify" else show(directory)


def verify(directory: Path) -> int:
    """Print every file and its state.

    Raises:
        CheckpointError: some are damaged; the first is named.
    """
    bad = []
    for path in found_in(directory):
        print(path.name)
        for name, fault in check(path):
            size = human((path / name).stat().st_size) if (path / name).is_file() else ""
            print(f"  {name:<40}{size:>10}  {fault or 'whole'}")
            bad += [f"{path.name}/{name}: {fault}"] if fault else []
    if bad:
        more = f", and {len(bad) - 1} more" if len(bad) > 1 else ""
        raise CheckpointError(f"damaged: {bad[0]}{more}; a run goes on from the newest checkpoint that is whole")
    return 0


def show(directory: Path) -> int:
    """Print a line a checkpoint: step, size, ranks, age, loss. Files are not read through; `verify` does."""
    print(f"{'step':>10}  {'size':>10}  {'ranks':>5}  {'age':>8}  loss")
    for path in found_in(directory):
        position = read_position(path)
        size = sum(file.stat().st_size for file in path.iterdir() if file.is_file())
        age = time.time() - (path / MANIFEST).stat().st_mtime
        loss = "" if position.loss is None else f"{position.loss:.4f}"
        print(f"{position.step:>10}  {human(size):>10}  {Stored(path).world:>5}  {_age(age):>8}  {loss}")
    return 0


def export(directory: Path, output: Path, dtype: str | None) -> int:
    """Write a plain Hugging Face directory of the newest whole checkpoint, one tensor at a time.

    Asked for fp32, it has the masters of a run whose weights are narrower. Adapters are merged into their base, which
    is whole in memory then.
    """
    path = _newest(directory)
    if (path / peft.CONFIG).exists():
        return _merged(path, output, dtype)
    values, stored = WholeParameters(path), Stored(path)
    kept = DTYPES[dtype] if dtype else values.stored
    files = ModelFiles(read_config(path), path)

    def whole(name: str) -> Tensor:
        wide = kept == torch.float32 and MASTER + name in stored.entries
        return stored.read(MASTER + name) if wide else values[name]

    def write(target: Path) -> None:
        plan = files.plan(kept, whole)
        for file, items in plan.items():
            write_shard(target / file, items)
        files.finish(target, kept, plan)
        _describe(path, target, output.resolve().name)

    replace_directory(output, write)
    print(f"{path} as {str(kept).removeprefix('torch.')}: {output}")
    return 0


def _describe(path: Path, target: Path, name: str) -> None:
    """The card of an exported checkpoint; evaluations of the run's finished model are of these weights too."""
    position, run = read_position(path), path.resolve().parent.parent
    model, rows = run / "model", read_rows(run / "log.jsonl")
    same = card.steps(model) == position.step
    trained = card.training(position.recipe, position.step, position.tokens, rows)
    card.put(target, trained, model / card.EVALUATION if same else None, name)


def _merged(path: Path, output: Path, dtype: str | None) -> int:
    adapter = peft.AdapterDirectory(path)
    base = adapter.base
    if not base or not Path(base).is_dir():
        told = f"their base, {base}, is not there" if base else "their base was drawn from a seed"
        raise CheckpointError(f"{path} holds adapters alone, and {told}: run the recipe to its end, which writes both")
    kept = DTYPES[dtype] if dtype else torch.float32
    config = read_config(base)
    if adapter.reward and config["architectures"][0] not in CAUSAL:
        config = as_reward(config)
    decoder = load(base, wanted=config)
    peft.load_adapter(decoder, path)
    merge(decoder)

    def write(target: Path) -> None:
        save(decoder, target, config=config, dtype=kept)
        copy_files(path, target, TOKENIZER_FILES)
        _describe(path, target, output.resolve().name)

    replace_directory(output, write)
    print(f"{path} merged into {base}, as {str(kept).removeprefix('torch.')}: {output}")
    return 0


def found_in(directory: Path) -> list[Path]:
    """The checkpoint that `directory` is, or those in it, oldest first.

    Raises:
        CheckpointError: there is none.
    """
    if (directory / MANIFEST).exists():
        return [directory]
    for store in (Checkpoints(directory / "checkpoints"), Checkpoints(directory)):
        if steps := store.steps():
            return [store.path(step) for step in steps]
    raise CheckpointError(
        f"{directory} holds no checkpoint: give a run's directory, its checkpoints, or one of them (step-00000100)"
    )


def _newest(directory: Path) -> Path:
    faults = []
    for path in reversed(found_in(directory)):
        fault = damage(path)
        if fault is None:
            return path
        faults.append(f"{path.name}: {fault}")
    raise CheckpointError(f"no checkpoint in {directory} is whole: {'; '.join(faults)}")


def _age(seconds: float) -> str:
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(0, seconds):.0f} s"
