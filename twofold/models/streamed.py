"""A checkpoint's decoder with streamed layers: the file of sections made at the first time, and opened."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..core.errors import CheckpointError
from ..platforms.direct import Direct
from .decoder import Decoder
from .quantized import prepare
from .sections import Making, Section, identity, is_made, place_of, sections, size_of
from .streaming import Stream, kept_layers
from .weights import load, open_shards, read_formats, read_spec

log = logging.getLogger(__name__)


def bare(folder: Path, dtype: torch.dtype, max_len: int | None, quantization: str | None) -> Decoder:
    """A checkpoint's decoder without memory, quantized weights in their places.

    Raises:
        CheckpointError, ConfigError: as `weights.load`.
    """
    spec = read_spec(folder)
    positions = spec.embedding.positions
    if max_len is not None and positions is not None and max_len > positions.size:
        raise CheckpointError(f"this model has {positions.size} position vectors; a context of {max_len} needs more")
    decoder = Decoder(spec, dtype=dtype, device="meta", max_len=max_len)
    prepare(decoder, read_formats(folder, quantization))
    return decoder


def load_streamed(
    folder: str | Path,
    *,
    dtype: torch.dtype,
    max_len: int | None,
    quantization: str | None,
    budget: int,
    directory: Path,
) -> Decoder:
    """A checkpoint's decoder whose layers are read from a file in `directory`, made there at the first time.

    Layers and buffers take `budget` bytes at most; `decoder.stream` reads.

    Raises:
        CheckpointError, ConfigError: as `weights.load`, or the file is not whole.
        CapacityError: a budget less than two layers, or no room on the disk.
    """
    folder = Path(folder)
    decoder = bare(folder, dtype, max_len, quantization)
    found = sections(decoder)
    kept = kept_layers(found, budget)
    open_shards(folder)  # a checkpoint that is cut short is refused, whatever was made of it before
    key, path = identity(folder, found), place_of(directory, folder, found)
    if not is_made(path, key, size_of(found)):
        how: dict[str, Any] = {"dtype": dtype, "max_len": max_len, "quantization": quantization}
        make_file(folder, path, key, found, lambda memory: load(folder, memory=memory, **how))
    log.info("weights are streamed from %s", path)
    try:
        decoder.stream = Stream(decoder, Direct(path), found, kept)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from None
    return decoder


def make_file(
    folder: Path, path: Path, key: str, found: list[Section], load_into: Callable[[Callable[[Decoder], None]], Decoder]
) -> None:
    """Load a checkpoint into memory that is a file: a layer takes no memory but the cache of that file."""
    log.info("making %s, %.0f MiB, once for this checkpoint", path, size_of(found) / 2**20)
    making = Making(path, key, size_of(found))
    try:
        load_into(partial(map_into, found, making))
        making.finish()
    except BaseException:
        making.drop()
        raise


def map_into(found: list[Section], making: Making, decoder: Decoder) -> None:
    """Let a decoder's tensors be the file's bytes."""
    raw = making.raw()
    for section in found:
        section.put(decoder, raw[section.begin : section.begin + section.nbytes])
