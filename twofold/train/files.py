"""A run's model as Hugging Face lays it out: which tensors go to which file, and what stands beside them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ..models import peft, weights
from ..models.decoder import Decoder
from ..models.shards import Pending

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)
LEAST = 1 << 30
"""Bytes of weights that are worth a file, and so a rank that writes it, of their own."""


class Files(Protocol):
    """What of a run has files of its own beside what the next step depends on."""

    def plan(
        self, dtype: torch.dtype, whole: Callable[[str], Tensor] | None = None, writers: int = 1
    ) -> dict[str, list[Pending]]:
        """The tensors of each file in order, about a file for each writer; `whole` gives a parameter by name."""
        ...

    def finish(self, directory: Path, dtype: torch.dtype, files: Mapping[str, list[Pending]]) -> None:
        """Everything but the tensors."""
        ...


class ModelFiles:
    """The directory of a model whose tensors may lie anywhere; `config` is its config.json."""

    def __init__(self, config: Mapping[str, Any], tokenizer: Path, *, least: int = LEAST) -> None:
        self.config, self.tokenizer, self._least = config, tokenizer, least
        self.spec = weights.spec_from(config)
        self._decoders: dict[torch.dtype, Decoder] = {}

    def plan(
        self, dtype: torch.dtype, whole: Callable[[str], Tensor] | None = None, writers: int = 1
    ) -> dict[str, list[Pending]]:
        """The tensors of each file in order, about a file for each writer; `whole` gives a parameter by name."""
        decoder = self._decoder(dtype)
        size = sum(p.numel() * p.element_size() for p in decoder.parameters())
        each = max(self._least, min(weights.SHARD_BYTES, -(-size // writers)))
        return weights.plan_files(decoder, each, whole)

    def finish(self, directory: Path, dtype: torch.dtype, files: Mapping[str, list[Pending]]) -> None:
        """Everything but the tensors: config, index, tokenizer."""
        weights.write_rest(directory, self._decoder(dtype), self.config, files)
        copy_files(self.tokenizer, directory, TOKENIZER_FILES)

    def _decoder(self, dtype: torch.dtype) -> Decoder:
        if dtype not in self._decoders:
            self._decoders[dtype] = Decoder(self.spec, dtype=dtype, device="meta")
        return self._decoders[dtype]


class AdapterFiles:
    """The directory of an adapted decoder's adapters, as PEFT lays it out; `base` is where the weights came from."""

    def __init__(self, decoder: Decoder, base: str, tokenizer: Path) -> None:
        self.decoder, self.base, self.tokenizer = decoder, base, tokenizer

    def plan(
        self, dtype: torch.dtype, whole: Callable[[str], Tensor] | None = None, writers: int = 1
    ) -> dict[str, list[Pending]]:
        """One file of all tensors, in order."""
        return {peft.WEIGHTS: peft.pending(self.decoder, whole, dtype)}

    def finish(self, directory: Path, dtype: torch.dtype, files: Mapping[str, list[Pending]]) -> None:
        """The settings, and the tokenizer."""
        weights.write_json(directory / peft.CONFIG, peft.config_json(self.decoder, self.base))
        copy_files(self.tokenizer, directory, TOKENIZER_FILES)


def copy_files(source: Path, target: Path, names: Iterable[str]) -> None:
    """Copy those of `names` that `source` has."""
    for name in names:
        if (source / name).is_file():
            (target / name).write_bytes((source / name).read_bytes())
