"""A checkpoint's directory as the decoder's parameters, one whole at a time: for whoever keeps only a part of each."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core.errors import CheckpointError
from .decoder import Decoder
from .filler import Filler
from .layout import Slot
from .quantized import KEY
from .scoring import Exchange
from .shards import Shard
from .weights import open_shards, read_config, spec_from


class WholeParameters:
    """The float parameters of a directory; every name and shape is checked before the first is read.

    `wanted` is a config.json's contents in place of the directory's, with other heads on the same layers
    (`scoring.py`): a score head that is not there yet is zeros.

    Raises:
        CheckpointError: anything missing, left over, of another shape, damaged or quantized, named.
    """

    def __init__(self, path: Path, dtype: torch.dtype = torch.float32, wanted: Mapping[str, Any] | None = None) -> None:
        config = read_config(path)
        if config.get(KEY):
            raise CheckpointError(f"{path} is quantized: weights can be divided among ranks only as floats")
        stored = spec_from(config)
        self.spec = stored if wanted is None else spec_from(wanted)
        decoder = Decoder(self.spec, dtype=dtype, device="meta")
        self._kinds = {name: (t.shape, t.dtype) for name, t in (*decoder.named_parameters(), *decoder.named_buffers())}
        self._filler = Filler(decoder, exchange=Exchange.of(stored, self.spec))
        self._places: dict[str, list[tuple[Shard, str, Slot]]] = {}
        for shard in open_shards(path):
            for name, entry in shard.entries.items():
                slot = self._filler.claim(name, entry.shape, entry.dtype)
                if slot is not None:
                    self._places.setdefault(slot.inner, []).append((shard, name, slot))
        self._places |= {name: [] for name in self._filler.finish()}

    @property
    def stored(self) -> torch.dtype:
        """The dtype that the first of them has on disk."""
        shard, name, _ = next(iter(self._places.values()))[0]
        return shard.entries[name].dtype

    def __getitem__(self, name: str) -> Tensor:
        """One parameter by the decoder's name, made of the tensors that are parts of it."""
        shape, dtype = self._kinds[name]
        whole = torch.zeros(shape, dtype=dtype)
        heads = []
        for shard, stored, slot in self._places[name]:
            if self._filler.is_tied_head(stored):
                heads.append((shard, stored))
                continue
            slot.write(whole, shard.tensor(stored))
            shard.release(stored)
        for shard, stored in heads:
            if not torch.equal(shard.tensor(stored).to(dtype), whole):
                raise CheckpointError(
                    f"'{stored}' differs from the embedding although config.json ties them; "
                    "set tie_word_embeddings to false"
                )
            shard.release(stored)
        return whole
