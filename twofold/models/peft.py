"""Adapters on disk as PEFT has them: adapter_config.json and adapter_model.safetensors, read strictly, both ways.

    base_model.model.model.layers.3.self_attn.q_proj.lora_A.weight [R, K]   <->   layers.3.qkv.lora.q_proj.a
    base_model.model.model.layers.3.self_attn.q_proj.lora_B.weight [n, R]   <->   layers.3.qkv.lora.q_proj.b

Where a checkpoint orders the rows of a fused weight by heads, B's rows lie there in that order, as the weight's do.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..core.errors import CheckpointError, ConfigError
from ..quant.linear import QuantLinear
from .decoder import Decoder
from .layout import Slot
from .lora import adapt, chosen, config_of, loras, rows_of, take_away, target_of, trained_parameters
from .lora_config import LoraConfig
from .scoring import TENSOR
from .shards import Pending, Shard, write_shard
from .spec import Mixture
from .tensors import Weight
from .weights import read_json, write_json

CONFIG, WEIGHTS, PREFIX = "adapter_config.json", "adapter_model.safetensors", "base_model.model."
A, B = ".lora_A.weight", ".lora_B.weight"
SCORE = PREFIX + TENSOR
READ = ("peft_type", "r", "lora_alpha", "use_rslora", "bias")
SAYS_NOTHING = {
    "auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying", "eva_config", "fan_in_fan_out",
    "inference_mode", "layers_pattern", "layers_to_transform", "loftq_config", "lora_dropout", "megatron_core",
    "peft_version", "qalora_group_size", "revision", "runtime_config", "target_modules", "task_type",
}  # fmt: skip
"""Keys that do not change what an adapter makes: which modules it is for is in the names of its tensors."""
HEADS = {"score", "classifier"}
"""What may be trained whole: PEFT names both for a reward model, whichever it has."""
STARTS = (True, False, "gaussian", "eva", "orthogonal")
"""Values of `init_lora_weights` that leave the base as it was; the others have changed it."""


def slots_of(decoder: nn.Module) -> dict[str, Slot]:
    """Every tensor of an adapted decoder's adapters, by PEFT's name, and its score head's."""
    found = {}
    if (score := trained_parameters(decoder).get(TENSOR)) is not None:
        found[SCORE] = Slot(name=SCORE, shape=tuple(score.shape), inner=TENSOR)
    for place, lora in loras(decoder).items():
        for pair in lora.pairs:
            for slot in pair_slots(place, pair.slot, tuple(pair.a.shape), tuple(pair.b.shape)):
                found[slot.name] = slot
    return found


def pair_slots(place: str, slot: Slot, a: tuple[int, ...], b: tuple[int, ...]) -> tuple[Slot, Slot]:
    """A and B, of these shapes, beside what `slot` is of the weight at `place`."""
    stem, inner = PREFIX + target_of(slot), f"{place}.lora.{target_of(slot).rpartition('.')[2]}"
    layout = "plain" if slot.layout == "transposed" else slot.layout
    rows = replace(slot, name=stem + B, shape=b, inner=inner + ".b", at=(), layout=layout)
    return Slot(name=stem + A, shape=a, inner=inner + ".a"), rows


def config_json(decoder: Decoder, base: str = "") -> dict[str, Any]:
    """adapter_config.json of an adapted decoder, whose weights were those of `base`."""
    config, slots = config_of(decoder), [pair.slot for lora in loras(decoder).values() for pair in lora.pairs]
    assert config is not None, "an adapted decoder"
    mixed = any(isinstance(layer.ffn, Mixture) for layer in decoder.spec.layers)  # experts may have the same last names
    names = {target_of(slot) if mixed else target_of(slot).rpartition(".")[2] for slot in slots}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if decoder.spec.head else "SEQ_CLS",
        "base_model_name_or_path": base or None,
        "r": config.rank,
        "lora_alpha": int(config.alpha) if config.alpha == int(config.alpha) else config.alpha,
        "use_rslora": config.rslora,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted(names),
        "modules_to_save": ["score"] if decoder.spec.score else None,
        "fan_in_fan_out": any(slot.layout == "transposed" for slot in slots),
        "init_lora_weights": True,
        "inference_mode": True,
    }


def pending(
    decoder: Decoder, whole: Callable[[str], Tensor] | None = None, dtype: torch.dtype | None = None
) -> list[Pending]:
    """The tensors of adapter_model.safetensors, as `dtype`; `whole` gives one by the decoder's name."""
    parameters = trained_parameters(decoder)
    give = whole or (lambda name: parameters[name].detach())
    return [
        Pending(
            name=name,
            dtype=dtype or parameters[slot.inner].dtype,
            shape=slot.shape,
            values=partial(_read, slot, give),
            source=slot.inner,
        )
        for name, slot in slots_of(decoder).items()
    ]


def _read(slot: Slot, whole: Callable[[str], Tensor]) -> Tensor:
    return slot.read(whole(slot.inner))


def save_adapter(decoder: Decoder, path: str | Path, base: str = "", dtype: torch.dtype | None = None) -> None:
    """Write the adapters of a decoder as a directory that PEFT loads; `base` is where the model under them is."""
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    write_shard(path / WEIGHTS, pending(decoder, dtype=dtype))
    write_json(path / CONFIG, config_json(decoder, base))


class AdapterDirectory:
    """A PEFT directory, its settings read and its tensors there to be asked for.

    Raises:
        CheckpointError: a setting that changes what an adapter makes and is not built, no safetensors, damage.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        table = read_json(self.path / CONFIG)
        if not (self.path / WEIGHTS).exists():
            pickled = (self.path / "adapter_model.bin").exists()
            more = "adapter_model.bin can run code when opened: convert it" if pickled else "is this a PEFT directory?"
            raise CheckpointError(f"{self.path} has no {WEIGHTS}; {more}")
        self.base = str(table.get("base_model_name_or_path") or "")
        """Where it says that the model under it is."""
        self.reward = table.get("task_type") == "SEQ_CLS"
        """Whether it is for a model with a score head in place of the language head."""
        self._shard = Shard(self.path / WEIGHTS)
        self.config = _config(self.path / CONFIG, table, sorted(self._shard.entries))

    def check(self, decoder: nn.Module) -> dict[str, Slot]:
        """The slots of an adapted decoder by its own names, when the directory has each of them and nothing else.

        Raises:
            CheckpointError: an unknown, missing or misshapen tensor, or one that is no float, named.
        """
        slots = slots_of(decoder)
        self._match(slots)
        return {slot.inner: slot for slot in slots.values()}

    def pairs(self, decoder: Decoder) -> dict[str, list[tuple[Slot, Slot, Slot]]]:
        """For each weight of a decoder without adapters what it has beside it: the weight's slots with their A and B.

        Raises:
            CheckpointError: as `check`.
        """
        try:
            targets = chosen(decoder, self.config)
        except ConfigError as error:
            raise CheckpointError(f"{self.path}: {error}") from None
        found: dict[str, list[tuple[Slot, Slot, Slot]]] = {}
        for place, slots in targets.items():
            module = decoder.get_submodule(place)
            n, k = module.shape if isinstance(module, QuantLinear) else cast(Weight, module).weight.shape
            for slot in slots:
                rows = rows_of(slot, n)
                shapes = (self.config.rank, k), (rows.stop - rows.start, self.config.rank)
                found.setdefault(place, []).append((slot, *pair_slots(place, slot, *shapes)))
        self._match({slot.name: slot for three in found.values() for _, *two in three for slot in two})
        return found

    @property
    def names(self) -> Collection[str]:
        """The tensors that are there."""
        return self._shard.entries.keys()

    @property
    def nbytes(self) -> int:
        return sum(entry.end - entry.begin for entry in self._shard.entries.values())

    def _match(self, slots: Mapping[str, Slot]) -> None:
        for name, entry in self._shard.entries.items():
            if name == SCORE and name not in slots:
                continue  # a critic's adapter beside the causal model that it is too
            if name not in slots:
                raise CheckpointError(f"{self.path}: left-over tensor '{name}': this model has no such adapter")
            if entry.shape != slots[name].shape:
                given, asked = list(entry.shape), list(slots[name].shape)
                raise CheckpointError(f"{self.path}: tensor '{name}' has shape {given}; this model asks for {asked}")
            if not entry.dtype.is_floating_point or entry.dtype.itemsize < 2:
                raise CheckpointError(f"{self.path}: tensor '{name}' is {entry.dtype}; floats are needed")
        for name in slots:
            if name not in self._shard.entries:
                raise CheckpointError(f"{self.path} lacks '{name}', which r and its other tensors ask for")

    def read(self, slot: Slot) -> Tensor:
        """One tensor in the decoder's order of rows, as it is stored."""
        stored = self._shard.tensor(slot.name)
        out = torch.empty(stored.shape, dtype=stored.dtype)
        slot.write(out, stored)
        return out


class AdapterParameters:
    """The adapters of a directory by the names of an adapted decoder, one whole at a time; it needs no memory.

    Raises:
        CheckpointError: what `AdapterDirectory` and its `check` say.
    """

    def __init__(self, path: str | Path, decoder: nn.Module) -> None:
        self._directory = AdapterDirectory(path)
        self._slots = self._directory.check(decoder)

    def __getitem__(self, name: str) -> Tensor:
        return self._directory.read(self._slots[name])


def load_adapter(decoder: Decoder, path: str | Path) -> LoraConfig:
    """Put the adapters of a PEFT directory beside a decoder's weights, which are frozen; what they were made with.

    A decoder that was adapted alike takes the values.

    Raises:
        CheckpointError: an unknown, missing or misshapen tensor, or a setting that is not built, named.
    """
    directory, before = AdapterDirectory(path), config_of(decoder)
    if before is None:
        try:
            adapt(decoder, directory.config)
        except ConfigError as error:
            raise CheckpointError(f"{path}: {error}") from None
    try:
        slots = directory.check(decoder)
        if before and (before.rank, before.scale) != (directory.config.rank, directory.config.scale):
            raise CheckpointError(f"{path} is of another rank or scale than the decoder's adapters")
    except CheckpointError:
        if before is None:
            take_away(decoder)
        raise
    with torch.no_grad():
        for name, parameter in trained_parameters(decoder).items():
            parameter.copy_(directory.read(slots[name]))
    return directory.config


def _config(file: Path, table: Mapping[str, Any], names: list[str]) -> LoraConfig:
    """What adapter_config.json says, every key either read or known to say nothing; targets by the tensors' names."""
    if table.get("peft_type") != "LORA":
        raise CheckpointError(f"{file}: peft_type is {table.get('peft_type')!r}; only LORA is built")
    if not any(table.get("init_lora_weights", True) is it or table["init_lora_weights"] == it for it in STARTS):
        raise CheckpointError(
            f"{file}: init_lora_weights {table['init_lora_weights']!r} has changed the base model; convert the adapter "
            "to plain LoRA with PEFT first"
        )
    for key, value in table.items():
        empty = value in (None, False, "none", "") or value in ([], {})
        if key == "modules_to_save" and not empty and set(value) <= HEADS:
            continue
        if key not in (*READ, "init_lora_weights") and key not in SAYS_NOTHING and not empty:
            raise CheckpointError(
                f"{file}: '{key}' is {value!r}, which is not built; adapters are plain A and B of one rank"
            )
    if table.get("bias", "none") != "none":
        raise CheckpointError(f"{file}: bias is {table['bias']!r}; adapters with biases of their own are not built")
    rank, alpha, rslora = table.get("r"), table.get("lora_alpha"), table.get("use_rslora", False)
    if type(rank) is not int or not isinstance(alpha, int | float) or type(rslora) is not bool:
        raise CheckpointError(f"{file}: r {rank!r}, lora_alpha {alpha!r}, use_rslora {rslora!r} are not an adapter's")
    targets = {name.removeprefix(PREFIX).removesuffix(A) for name in names if name.endswith(A)}
    if not targets:
        raise CheckpointError(f"{file.with_name(WEIGHTS)} has no tensor called ...{A}")
    try:
        return LoraConfig(rank=rank, alpha=float(alpha), rslora=rslora, targets=tuple(sorted(targets)))
    except ConfigError as error:
        raise CheckpointError(f"{file}: {error}") from None
