"""Weights in and out: a Hugging Face directory to a Decoder, a Decoder to a Hugging Face directory.

    load   config.json -> spec -> decoder without memory -> every name and shape checked -> memory -> shard by shard
    save   config.json, model.safetensors (or shards and their index), as transformers reads them

Quantized weights are read and written as compressed-tensors has them, and float ones rounded on the way in when asked.

Loading needs the weights' memory plus one tensor. Pickled weights and code from the checkpoint are never touched.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor

from ..core.errors import CheckpointError, ConfigError, unknown
from ..core.sparse import sparse_attention
from ..quant.compressed import check_written
from ..quant.format import Format
from ..quant.linear import QuantLinear
from ..quant.stored import Stored
from .decoder import Decoder
from .families import ENCODERS, FAMILIES, HEADLESS
from .filler import Filler
from .gguf.file import GgufFile
from .gguf.tensors import LINK, GgufShard
from .layout import Layouts, Piece, Slot, held, quantized_modules
from .lora import loras
from .memory import give_memory
from .quantized import KEY, check_config, config_of, formats, formats_of, prepare, stored_formats
from .reader import Reader
from .scoring import CAUSAL, Exchange, scored
from .shards import Pending, Shard, write_shard
from .spec import ModelSpec

CONFIG = "config.json"
SPARSE = "sparse_attention"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
JSON_LIMIT = 64 << 20
SHARD_BYTES = 5 << 30


def read_config(path: str | Path) -> dict[str, Any]:
    """A checkpoint's config.json as it stands.

    Raises:
        CheckpointError: there is no such directory or file, or it is not a JSON table.
    """
    path = Path(path)
    if not path.is_dir():
        raise CheckpointError(f"{path} is not a directory; give a local checkpoint with config.json and safetensors")
    if (path / "adapter_config.json").is_file() and not (path / CONFIG).is_file():
        base = read_json(path / "adapter_config.json").get("base_model_name_or_path") or "its base model"
        raise CheckpointError(f"{path} holds adapters and no model: give {base}, or export the two as one")
    return read_json(path / CONFIG)


def spec_from(config: Mapping[str, Any]) -> ModelSpec:
    """A config.json's contents as a ModelSpec.

    Raises:
        CheckpointError: an architecture that Twofold does not build, or a setting that nobody reads.
    """
    names = config.get("architectures")
    if not isinstance(names, list) or len(names) != 1 or not isinstance(names[0], str):
        raise CheckpointError(f"config.json: 'architectures' must name one architecture, not {names!r}")
    family = CAUSAL.get(names[0], names[0])
    bare = HEADLESS if family in HEADLESS else ENCODERS
    if family not in FAMILIES and family not in bare:
        raise CheckpointError("config.json: " + unknown("architecture", names[0], [*FAMILIES, *CAUSAL, *ENCODERS]))
    reader = Reader(config)
    check_config(reader.get(dict, KEY, default=None))
    sparse = reader.get(dict, SPARSE, default=None)
    spec = bare[family](reader) if family in bare else scored(FAMILIES[family](reader), reader, names[0])
    reader.finish()
    return spec if sparse is None else sparsified(spec, sparse)


def sparsified(spec: ModelSpec, table: Mapping[str, Any]) -> ModelSpec:
    """The spec with block-sparse attention as the table says (`core/sparse.py`), its other layers dense.

    Raises:
        CheckpointError: what is wrong with the table, or an encoder, for which there are no layouts.
    """
    if spec.encoder:
        raise CheckpointError(
            f"config.json: sparse layouts are of causal attention, and {spec.architecture} looks ahead"
        )
    try:
        sparse = sparse_attention(table, len(spec.layers))
    except ConfigError as error:
        raise CheckpointError(f"config.json: {error}") from None
    made = (replace(its, mixer=replace(its.mixer, sparse=sparse.at(i))) for i, its in enumerate(spec.layers))
    return replace(spec, layers=tuple(made))


def read_spec(path: str | Path) -> ModelSpec:
    """The ModelSpec of a checkpoint's directory, without touching its weights."""
    return spec_from(read_config(path))


def read_formats(path: str | Path, quantization: str | None = None) -> dict[str, Format]:
    """The number formats that `load` would give a decoder: the checkpoint's own, or those asked for; {} is all float.

    Raises:
        ConfigError: no format of that name, or another one than the checkpoint's weights already have.
        CheckpointError: a quantization that Twofold does not build.
    """
    decoder = Decoder(read_spec(path), device="meta")
    return _formats(decoder, Path(path), quantization)[0]


def _formats(decoder: Decoder, path: Path, quantization: str | None) -> tuple[dict[str, Format], dict[str, Stored]]:
    """The format of each quantized place, and how it lies on disk when it does."""
    config = read_config(path)
    stored = stored_formats(decoder, config, open_shards(path)) if config.get(KEY) else {}
    mine = {place: its.format for place, its in stored.items()}
    if quantization is None:
        return mine, stored
    wanted = formats(decoder, quantization)
    for place, format in mine.items():
        if wanted.get(place) != format:
            raise ConfigError(
                f"{path} is quantized already ({place} is {format.name}): leave quantization out, or give the float "
                "checkpoint it was made from"
            )
    return (mine, stored) if stored else (wanted, {})


def load(
    path: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    max_len: int | None = None,
    quantization: str | None = None,
    memory: Callable[[Decoder], None] | None = None,
    sparse: Mapping[str, Any] | None = None,
    wanted: Mapping[str, Any] | None = None,
) -> Decoder:
    """Build the decoder of a checkpoint's directory and fill it; `max_len` is the context to build for.

    `quantization` names a number format (`quant.names`) that float weights are rounded to as they come, so that only
    one weight is ever whole; `dtype` is that of what stays float. `sparse` is a table like config.json's
    `sparse_attention`, in place of the checkpoint's own. `memory` gives the parameters theirs, where it is not to be
    fresh memory of `device`. `wanted` is a config.json's contents in place of the directory's, with other heads on the
    same layers (`scoring.as_reward` and its like): a head that is not wanted is left out, a score head that is not
    there yet starts as zeros.

    Raises:
        CheckpointError: anything missing, left over, of another shape, damaged or unsafe, named.
        ConfigError: no format of that name, or the weights are quantized already, in another.
    """
    path = Path(path)
    own = read_spec(path)
    spec = own if wanted is None else spec_from(wanted)
    spec = spec if sparse is None else sparsified(spec, sparse)
    positions = spec.embedding.positions
    if max_len is not None and positions is not None and max_len > positions.size:
        raise CheckpointError(f"this model has {positions.size} position vectors; a context of {max_len} needs more")
    decoder = Decoder(spec, dtype=dtype, device="meta", max_len=max_len)
    chosen, stored = _formats(decoder, path, quantization)
    prepare(decoder, chosen)
    filler = Filler(decoder, stored, Exchange.of(own, spec))
    shards = open_shards(path)
    slots = [
        {name: filler.claim(name, entry.shape, entry.dtype) for name, entry in shard.entries.items()}
        for shard in shards
    ]
    lacking = filler.finish()

    (memory or partial(give_memory, device=device))(decoder)
    with torch.no_grad():
        for name in lacking:
            decoder.get_parameter(name).zero_()
        _fill(Filler(decoder, stored), shards, slots)
    return decoder


def _fill(filler: Filler, shards: list[Shard], slots: list[dict[str, Slot | None]]) -> None:
    """Every tensor into its place; heads that are tied are compared with it when all others are there."""
    heads = []
    for shard, names in zip(shards, slots, strict=True):
        carried = {name: slot for name, slot in names.items() if slot is not None}
        placed = {name: filler.place(name, slot, shard.entries[name].dtype) for name, slot in carried.items()}
        straight = {name: place for name, place in placed.items() if place is not None}
        shard.read_into(straight)
        for name, slot in carried.items():
            if filler.is_tied_head(name):
                heads.append((shard, name, slot))
            elif name not in straight:
                filler.put(name, slot, shard.tensor(name))
                shard.release(name)
    for shard, name, slot in heads:
        filler.put(name, slot, shard.tensor(name))
        shard.release(name)


def load_tensors(decoder: Decoder, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Replace a decoder's weights in place by (checkpoint name, tensor) pairs, all of them, in any order.

    Each pair is consumed before the next is asked for. Where the decoder is quantized, float weights are rounded.

    Raises:
        CheckpointError: a left-over, repeated or misshapen tensor when it comes; missing ones at the end.
    """
    filler = Filler(decoder)
    with torch.no_grad():
        for name, tensor in tensors:
            slot = filler.claim(name, tuple(tensor.shape), tensor.dtype)
            if slot is not None and not filler.is_tied_head(name):
                filler.put(name, slot, tensor)
    filler.finish()


def decoder_tensors(decoder: Decoder) -> Iterator[tuple[str, Tensor]]:
    """The decoder's weights by the checkpoint's names and layouts; views of its storage where rows lie together.

    A quantized weight is given as its parts: codes, scales, zeros.
    """
    for item in _pending(decoder):
        yield item.name, item.values()


def save(
    decoder: Decoder,
    path: str | Path,
    *,
    config: Mapping[str, Any],
    dtype: torch.dtype | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a checkpoint that transformers and Twofold load back equal.

    `config` is the config.json to write (its dtype is set to the weights'); it must describe this decoder. Float
    weights are written as `dtype`, one at a time, else as they are. A file of an earlier checkpoint in the same
    directory that the new one does not overwrite is removed.

    Raises:
        CheckpointError: `config` describes another model, or the decoder has adapters, which have a file of their own.
    """
    if loras(decoder):
        raise CheckpointError("save: the decoder has adapters; merge them (models.lora.merge) or use save_adapter")
    if spec_from(config) != decoder.spec:
        raise CheckpointError(
            "save: config describes another model than the decoder; give the config it was built from"
        )
    check_written(formats_of(decoder).values())
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    files = plan_files(decoder, shard_bytes, dtype=dtype)
    for file, items in files.items():
        write_shard(path / file, items)
    write_rest(path, decoder, config, files, dtype)


def plan_files(
    decoder: Decoder,
    shard_bytes: int = SHARD_BYTES,
    whole: Callable[[str], Tensor] | None = None,
    dtype: torch.dtype | None = None,
) -> dict[str, list[Pending]]:
    """Which tensors go to which file of a checkpoint, in order, a file cut where it would outgrow `shard_bytes`.

    `whole` gives a float parameter by its name, asked for when its turn comes, for a decoder that has no memory.
    """
    shards: list[list[Pending]] = [[]]
    size = 0
    for item in _pending(decoder, whole, dtype):
        if shards[-1] and size + item.nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(item)
        size += item.nbytes
    if len(shards) == 1:
        return {SINGLE: shards[0]}
    return {f"model-{n + 1:05}-of-{len(shards):05}.safetensors": items for n, items in enumerate(shards)}


def write_rest(
    path: Path,
    decoder: Decoder,
    config: Mapping[str, Any],
    files: Mapping[str, list[Pending]],
    dtype: torch.dtype | None = None,
) -> None:
    """What a checkpoint has besides its tensors: the index of several files, and config.json."""
    if len(files) > 1:
        where = {item.name: file for file, items in files.items() for item in items}
        total = sum(item.nbytes for items in files.values() for item in items)
        write_json(path / INDEX, {"metadata": {"total_size": total}, "weight_map": where})
    ours = {*files, INDEX} if len(files) > 1 else set(files)
    for old in path.glob("model*.safetensors*"):
        if old.name not in ours and re.fullmatch(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?", old.name):
            old.unlink()
    written = {key: value for key, value in config.items() if key not in ("torch_dtype", KEY)}
    told = config_of(decoder)
    floats = dtype or next((p.dtype for p in decoder.parameters()), decoder.dtype)
    written |= {"dtype": str(floats).removeprefix("torch.")} | ({KEY: told} if told else {})
    write_json(path / CONFIG, written)


def _pending(
    decoder: Decoder, whole: Callable[[str], Tensor] | None = None, dtype: torch.dtype | None = None
) -> Iterator[Pending]:
    """Every tensor of the checkpoint, its values made when they are asked for; float ones to be written as `dtype`."""
    parameters, exact = held(decoder), dict(decoder.named_buffers())
    quantized = quantized_modules(decoder)
    for name, slot in Layouts(decoder).slots.items():
        if isinstance(slot, Piece):
            module = quantized[slot.inner.removesuffix(".weight")]
            take = partial(_take, slot, module)
            yield Pending(name=name, dtype=slot.dtypes[0], shape=slot.shape, values=take)
        else:
            parameter = parameters[slot.inner].detach()
            values = partial(_read, slot, whole or {slot.inner: parameter}.__getitem__)
            kind = parameter.dtype if slot.inner in exact else dtype or parameter.dtype
            yield Pending(name=name, dtype=kind, shape=slot.shape, values=values, source=slot.inner)


def _take(piece: Piece, module: QuantLinear) -> Tensor:
    return piece.take(module.quantized)


def _read(slot: Slot, whole: Callable[[str], Tensor]) -> Tensor:
    return slot.read(whole(slot.inner))


def open_shards(path: Path) -> list[Shard]:
    """The safetensors files of a checkpoint, open and checked against its index.

    Raises:
        CheckpointError: no safetensors, an index that points outside the directory or disagrees with its files.
    """
    if (path / SINGLE).exists():
        return [Shard(path / SINGLE)]
    if (path / INDEX).exists():
        return _indexed(path)
    if (path / LINK).exists():
        return [GgufShard(GgufFile(path / LINK))]
    pickled = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in path.glob(pattern))
    if pickled:
        raise CheckpointError(
            f"{path} has only pickled weights ({pickled[0]}), which can run code when opened; convert it to safetensors"
        )
    raise CheckpointError(f"{path} has neither {SINGLE} nor {INDEX}")


def _indexed(path: Path) -> list[Shard]:
    where = read_json(path / INDEX).get("weight_map")
    if not isinstance(where, dict) or not where or not all(isinstance(file, str) for file in where.values()):
        raise CheckpointError(f"{path / INDEX}: 'weight_map' must map names to files")
    files = sorted(set(where.values()))
    for file in files:
        if not re.fullmatch(r"[\w.-]+\.safetensors", file) or file.startswith("."):
            raise CheckpointError(f"{path / INDEX} names '{file}'; only safetensors files beside it are read")
    shards = [Shard(path / file) for file in files]
    for file, shard in zip(files, shards, strict=True):
        listed = {name for name, home in where.items() if home == file}
        for name in sorted(listed ^ set(shard.entries)):
            place = "lacks" if name in listed else "holds the left-over"
            raise CheckpointError(f"{path / file} {place} tensor '{name}', by {INDEX}")
    return shards


@overload
def read_json(path: Path) -> dict[str, Any]: ...
@overload
def read_json(path: Path, kind: type[list[Any]]) -> list[Any]: ...
def read_json(path: Path, kind: type[Any] = dict) -> Any:
    """A JSON table of a checkpoint, or a list of one. Raises CheckpointError: missing, too large, or none."""
    try:
        if path.stat().st_size > JSON_LIMIT:
            raise CheckpointError(f"{path} is larger than {JSON_LIMIT >> 20} MiB")
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from None
    if not isinstance(data, kind):
        raise CheckpointError(f"{path} is not a JSON {'table' if kind is dict else 'list'}")
    return data


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Write a JSON table, whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(data, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    partial.replace(path)
