"""A folder that stands for a GGUF file: config.json, tokenizer and template made of what the file says, and a link.

    ~/.cache/twofold/gguf/NAME-4f1c2a09/   config.json  tokenizer.json  tokenizer_config.json  model.gguf ▸ the file

Everything else in Twofold reads folders. The folder is made anew when the file or what lies beside it has changed; a
tokenizer.json beside the file wins over the file's own vocabulary.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from ...core.cache import cache_folder
from ...core.errors import CheckpointError
from ...data.gguf_vocabulary import tokenizer_files
from .config import config_of
from .file import GgufFile
from .tensors import LINK, GgufShard, rope_factors

BESIDE = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
_VERSION = 1  # of what is written here


def folder_of(model: str | Path) -> Path:
    """The folder to read of a model: a GGUF file's stands for the file, a folder for itself."""
    path = Path(model)
    return unfolded(path) if path.suffix == ".gguf" and path.is_file() else path


def unfolded(path: Path, into: Path | None = None) -> Path:
    """The folder of a GGUF file, made where it is not there yet.

    Raises:
        CheckpointError: the file is damaged, or says what Twofold does not read.
        ConfigError: others may write to the folder of such folders.
    """
    path = path.resolve()
    try:
        found = path.stat()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from None
    beside = [path.parent / name for name in BESIDE if (path.parent / name).is_file()]
    stamps = [(str(file), file.stat().st_mtime_ns, file.stat().st_size) for file in beside]
    told = f"{_VERSION} {path} {found.st_mtime_ns} {found.st_size} {stamps}"
    folder = (into or cache_folder("gguf")) / f"{path.stem}-{hashlib.sha256(told.encode()).hexdigest()[:12]}"
    if not (folder / "config.json").is_file():
        folder.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        unfinished = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", dir=folder.parent))
        try:
            _write(path, unfinished, beside)
            unfinished.rename(folder)
        except OSError:
            if not (folder / "config.json").is_file():  # else another process was quicker
                raise
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def _write(path: Path, folder: Path, beside: list[Path]) -> None:
    file = GgufFile(path)
    shard = GgufShard(file)
    rows = shard.entries.get("model.embed_tokens.weight")
    if rows is None:
        raise CheckpointError(f"{path} has no token_embd.weight")
    config = config_of(file.meta, list(file.tensors), rows.shape[0], rope_factors(file))
    wide = {entry.dtype for entry in shard.entries.values() if len(entry.shape) > 1 and entry.dtype.is_floating_point}
    config["dtype"] = "bfloat16" if {str(dtype) for dtype in wide} == {"torch.bfloat16"} else "float32"
    if shard.kinds:
        config["quantization_config"] = {
            "quant_method": "gguf",
            "types": shard.kinds,
            "embedding": "model.embed_tokens.weight",
        }
    files: dict[str, Any] = {"config.json": config}
    if not any(other.name == "tokenizer.json" for other in beside):
        files |= tokenizer_files(file.meta, str(path))
    for name, table in files.items():
        text = table if isinstance(table, str) else json.dumps(table, indent=2) + "\n"
        (folder / name).write_text(text, encoding="utf-8")
    for other in beside:
        if other.name not in files:
            shutil.copyfile(other, folder / other.name)
    (folder / LINK).symlink_to(path)
