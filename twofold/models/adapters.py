"""Adapters of a served decoder: read from PEFT's directories, put into slots, added for the tokens that ask for one.

    directory ── read_adapter ──▶ Adapter (host memory) ── Slots.put ──▶ slot s of every product that it stands beside
    a step: Slots.step(counts, slots) says which token has which slot; the others' bits are the base model's

The weights stay as they are, whatever their format. On the CPU a slot only points at an adapter's memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from ..core.errors import CapacityError, CheckpointError, ConfigError
from ..kernels.slotted import Pairs, Part, Slotted
from ..quant.linear import QuantLinear
from .decoder import Decoder
from .layout import Slot
from .lora import chosen, loras, rows_of
from .lora_config import LoraConfig
from .peft import SCORE, AdapterDirectory
from .spec import ModelSpec
from .tensors import Weight


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """An adapter in memory: the pairs beside each weight. `digest` is of its numbers and what they are scaled by."""

    pairs: dict[str, Pairs]
    rank: int
    digest: str
    base: str

    @property
    def nbytes(self) -> int:
        return sum(pairs.nbytes for pairs in self.pairs.values())


class Slots:
    """`count` slots beside a decoder's layers, for adapters of rank `max_rank` at most.

    Raises:
        ConfigError: the decoder is being trained with adapters, or has no weight that takes one.
    """

    def __init__(self, decoder: Decoder, count: int, max_rank: int) -> None:
        self.count, self.max_rank = count, max_rank
        self._parts = {
            place: sorted(slots, key=lambda slot: _rows(decoder, place, slot).start)
            for place, slots in chosen(decoder, LoraConfig()).items()
        }
        self.beside = {
            place: Slotted(count, _shape(decoder, place)[1], [_rows(decoder, place, slot) for slot in slots])
            for place, slots in self._parts.items()
        }
        self.tokens: list[tuple[int, Tensor]] = []
        self._decoder: Decoder | None = None
        self.attach(decoder)

    @property
    def widest(self) -> int:
        """Ranks of all parts of one product together, at most."""
        return self.max_rank * max(len(slots) for slots in self._parts.values())

    def attach(self, decoder: Decoder) -> None:
        """Stand beside this decoder's weights from now on."""
        if loras(decoder):
            raise ConfigError("the decoder has adapters that are trained: merge them, or serve its base")
        for place, slotted in self.beside.items():
            module = cast(Weight | QuantLinear, decoder.get_submodule(place))
            if not (isinstance(module.lora, Beside) and module.lora.slots is self):
                module.lora = Beside(self, slotted)
        self._decoder = decoder

    def read(self, path: str | Path, most_bytes: int) -> Adapter:
        """The adapter of a PEFT directory, in this decoder's order of rows; numbers stay as they are stored.

        Raises:
            CheckpointError: it is not one, or not this model's, or has what is not built; named.
            CapacityError: it is of a larger rank than was provided for, or of more bytes.
        """
        assert self._decoder is not None
        directory = AdapterDirectory(path)
        if SCORE in directory.names:
            raise CheckpointError(f"{path}: modules_to_save is not empty: a score head is trained whole, not adapted")
        config = directory.config
        if config.rank > self.max_rank:
            raise CapacityError(f"{path} is of rank {config.rank}; start with --max-lora-rank {config.rank}")
        _within(path, directory.nbytes, most_bytes)
        hashed = blake2b(repr(config.scale).encode(), digest_size=16)
        found: dict[str, Pairs] = {}
        for place, pairs in directory.pairs(self._decoder).items():
            order = [slot.name for slot in self._parts[place]]
            pairs = sorted(pairs, key=lambda pair: order.index(pair[0].name))
            read = [(order.index(slot.name), directory.read(a), directory.read(b)) for slot, a, b in pairs]
            for number, a_RK, b_NR in read:
                for name, part in (("a", a_RK), ("b", b_NR)):
                    hashed.update(f"{place} {number} {name} {part.dtype} {tuple(part.shape)}".encode())
                    hashed.update(part.contiguous().view(torch.uint8).numpy().data)
            found[place] = _pairs(read, config.scale)
        made = Adapter(pairs=found, rank=config.rank, digest=hashed.hexdigest(), base=directory.base)
        _within(path, made.nbytes, most_bytes)
        return made

    def put(self, slot: int, adapter: Adapter | None) -> None:
        """Fill a slot, counted from 0, or empty it."""
        pairs = adapter.pairs if adapter is not None else {}
        for place, slotted in self.beside.items():
            slotted.put(slot, self._moved(pairs.get(place)))

    def _moved(self, pairs: Pairs | None) -> Pairs | None:
        """Where the decoder is, and on a device in what it computes in."""
        decoder = self._decoder
        if pairs is None or decoder is None or decoder.device.type == "cpu":
            return pairs
        to = decoder.device, decoder.compute
        parts = tuple(part._replace(b_NR=part.b_NR.to(*to)) for part in pairs.parts)
        return Pairs(pairs.a_RK.to(*to), parts, pairs.scale)

    @contextmanager
    def step(self, decoder: Decoder, counts: Sequence[int], slots: Sequence[int]) -> Iterator[None]:
        """Inside, the decoder's next tokens, `counts` of each span, have the adapters of these slots (from 1 on)."""
        self.attach(decoder)
        of_T = torch.tensor(slots).repeat_interleave(torch.tensor(counts))
        present = sorted({slot for slot in slots if slot})
        self.tokens = [(slot - 1, torch.where(of_T == slot)[0].to(decoder.device)) for slot in present]
        try:
            yield
        finally:
            self.tokens = []


class Beside(nn.Module):
    """What stands beside one weight: y with the adapters of the step's tokens added, y itself where there are none."""

    def __init__(self, slots: Slots, slotted: Slotted) -> None:
        super().__init__()
        self.slots, self.slotted = slots, slotted
        self.outputs = slotted.rows[-1].stop

    def forward(self, x_TK: Tensor, y_TN: Tensor) -> Tensor:
        return self.slotted.add(x_TK, y_TN, self.slots.tokens) if self.slots.tokens else y_TN


def bytes_beside(spec: ModelSpec, tokens: int, rank: int) -> int:
    """A bound on what adapters up to `rank` (0: none) add to a step of single kernels: one product's outputs and inputs
    once more, and its ranks.
    """
    widths = [layer.mixer.q_width + 2 * layer.mixer.kv_width for layer in spec.layers]
    for layer in spec.layers:
        widths += [2 * (getattr(layer.ffn, name, None) or 0) for name in ("width", "shared_width")]
    return 4 * tokens * (3 * max(widths, default=0) + 4 * rank) if rank else 0


def _pairs(read: Sequence[tuple[int, Tensor, Tensor]], scale: float) -> Pairs:
    """The As one below the other, and each B with where its part of their product begins."""
    parts, at = [], 0
    for number, a_RK, b_NR in read:
        parts.append(Part(number, at, _known(b_NR)))
        at += len(a_RK)
    return Pairs(_known(torch.cat([a_RK for _, a_RK, _ in read])), tuple(parts), scale)


def _within(path: str | Path, nbytes: int, most_bytes: int) -> None:
    if nbytes > most_bytes:
        raise CapacityError(f"{path} takes {nbytes} bytes; start with --lora-cache-bytes {nbytes} or more")


def _known(x: Tensor) -> Tensor:
    """As the kernels read it: what is neither fp32 nor bf16 is widened (fp16 exactly)."""
    return (x if x.dtype in (torch.float32, torch.bfloat16) else x.float()).contiguous()


def _shape(decoder: Decoder, place: str) -> tuple[int, int]:
    module = decoder.get_submodule(place)
    n, k = module.shape if isinstance(module, QuantLinear) else cast(Weight, module).weight.shape
    return n, k


def _rows(decoder: Decoder, place: str, slot: Slot) -> slice:
    return rows_of(slot, _shape(decoder, place)[0])
