"""The sum of bytes, made before anything is loaded: what a model needs, and what then fits beside it.

    memory this process may use
    ├── the runtime      interpreter, torch, the server          RUNTIME, measured
    ├── weights          exact: the decoder built without memory (torch's meta device), every tensor counted
    ├── one step         a bound: the widest moment of a step that fills the token budget
    └── KV cache         blocks; by default what max_num_seqs requests of full context want, and at most
                         HALF of what is left, so that neighbours and the page cache live too

When one request of full context does not fit, nothing is loaded: CapacityError names the setting that would fit.

Shapes in names: T tokens of a step, R requests, V vocabulary, D hidden size.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..core import CapacityError
from ..kernels import native, triton
from ..kernels.attention import KEYS
from ..models.adapters import Slots, bytes_beside
from ..models.compile import why_not, working_bytes
from ..models.decoder import Decoder
from ..models.quantized import formats, prepare
from ..models.sections import sections
from ..models.spec import Alibi, Gated, LayerSpec, Mixture, ModelSpec
from ..models.streaming import held_bytes, least_bytes
from ..models.weights import read_formats, read_spec
from ..quant.format import Format
from .config import EngineConfig
from .gentler import gentler
from .kinds import decided, step_tokens
from .paged import KVCache
from .sampler import NUMBERS_AT_ONCE

RUNTIME = 320 * 2**20  # interpreter, torch, tokenizer and server, resident before any weight
HALF = 0.5
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "auto": torch.float32}
LOGITS_AT_ONCE = 1 << 24
KV_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "int8": torch.int8,
    "fp8": torch.float8_e4m3fn,
}


def kv_dtype_of(wanted: str, weights: torch.dtype) -> torch.dtype:
    """What keys and values are kept in: as said, or as the weights are."""
    return weights if wanted == "auto" else KV_DTYPES[wanted]


def resolve(config: EngineConfig, folder: str | Path) -> EngineConfig:
    """The settings with "auto" decided: `dtype` bf16 for a bf16 checkpoint where the kernels take it as it is, else
    fp32; `kv_dtype` bf16 wherever the weights are narrower than fp32; `runner` by what the checkpoint is.
    """
    table: Any = {}
    try:
        table = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
        stored, packed = str(table.get("dtype") or table.get("torch_dtype")), bool(table.get("quantization_config"))
    except (OSError, ValueError, RecursionError, AttributeError):
        stored, packed = "", False  # whoever loads the checkpoint says what is wrong with it
    dtype, kv_dtype = config.dtype, config.kv_dtype
    if dtype == "auto":
        lacking = triton.missing() if config.device.startswith("cuda") else native.missing()
        as_it_is = stored.removeprefix("torch.") == "bfloat16" and not lacking
        dtype = "bfloat16" if as_it_is else "float32"
    if kv_dtype == "auto" and config.device == "cpu":
        kv_dtype = "bfloat16" if packed or config.quantization or dtype == "bfloat16" else "float32"
    return replace(decided(config, folder, table), dtype=dtype, kv_dtype=kv_dtype)


@dataclass(frozen=True, kw_only=True, slots=True)
class Forecast:
    """Bytes that a model would take under some settings, and what fits in `memory`.

    `activations` are what a step works in, and the room for adapters. `kv_per_token` and `kv_bytes` are the cache's,
    `blocks` what the engine would allocate, 0 when nothing fits.
    `context` is the longest request that fits (at most `wanted`), `concurrency` how many of that length at once. Where
    texts are pooled (`pooling`) there is no cache, and a step of the longest text either fits or does not.
    `fix` is empty when it fits, else what to do about it.
    """

    memory: int
    runtime: int
    weights: int
    wanted: int
    activations: int = 0
    kv_per_token: int = 0
    block_size: int = 0
    blocks: int = 0
    fix: str = ""
    pooling: bool = False

    @property
    def kv_bytes(self) -> int:
        """The blocks, and the one more that a KVCache keeps as nobody's."""
        return (self.blocks + 1) * self.block_size * self.kv_per_token if self.blocks else 0

    @property
    def total(self) -> int:
        return self.runtime + self.weights + self.activations + self.kv_bytes

    @property
    def context(self) -> int:
        return self.wanted if self.pooling else min(self.wanted, self.blocks * self.block_size)

    @property
    def concurrency(self) -> int:
        return self.blocks * self.block_size // self.context if self.context else 0

    @property
    def fits(self) -> bool:
        return not self.fix

    def require(self) -> Forecast:
        """This forecast when it fits; else CapacityError, before anything is loaded."""
        if not self.fits:
            raise CapacityError(self.fix)
        return self


def forecast(
    spec: ModelSpec,
    settings: EngineConfig,
    memory_bytes: int,
    *,
    loaded: bool = False,
    formats: Mapping[str, Format] | None = None,
) -> Forecast:
    """Bytes of weights, cache and one step, and how many blocks fit in `memory_bytes` (what is free now).

    `loaded` says that runtime and weights are in memory already, so that `memory_bytes` no longer holds them. `formats`
    are those of a checkpoint that is quantized itself (`models.read_formats`); a float one has `settings.quantization`.

    Raises:
        ConfigError: a reward model or an encoder, which make no text, where text is asked for.
    """
    if settings.runner != "pooling":
        spec.speaking()
    model = _Model(spec, loaded, formats or {}, program_bytes(spec, settings, formats or settings.quantization))
    found = _sum(model, settings, memory_bytes)
    return found if _enough(found) else replace(found, fix=_fix(model, settings, memory_bytes))


@dataclass(frozen=True, slots=True)
class _Model:
    """What is summed: a spec, whether it is in memory already, and the formats its checkpoint has."""

    spec: ModelSpec
    loaded: bool
    formats: Mapping[str, Format]
    program: tuple[int, int, int] | None

    def weight_bytes(self, settings: EngineConfig) -> int:
        if settings.weights == "stream":
            how = self.formats or settings.quantization
            found = sections(empty_decoder(self.spec, DTYPES[settings.dtype], how))
            return held_bytes(found, settings.weights_memory_bytes or least_bytes(found))
        return weight_bytes(self.spec, DTYPES[settings.dtype], self.formats or settings.quantization)

    def step_bytes(self, settings: EngineConfig) -> int:
        """What a step works in: what a compiled program holds, or a bound where layers run one kernel at a time."""
        if self.program is None or settings.device != "cpu":
            rank = settings.max_lora_rank if settings.enable_lora else 0
            return step_bytes(self.spec, settings) + bytes_beside(self.spec, settings.max_num_batched_tokens, rank)
        fixed, token, row = self.program
        tokens = settings.max_num_batched_tokens
        rows = 1 if settings.runner == "pooling" else rows_at_once(tokens, self.spec.vocab)
        looked_at = 2 * tokens * self.spec.hidden + 4 * rows * self.spec.vocab + 2**16  # finite? and the sampler's own
        return fixed + token * tokens + row * rows + looked_at


def _sum(model: _Model, settings: EngineConfig, memory: int) -> Forecast:
    spec = model.spec
    dtype = DTYPES[settings.dtype]
    wanted = settings.max_model_len or spec.max_len
    runtime, weights = (0, 0) if model.loaded else (RUNTIME, model.weight_bytes(settings) + draft_bytes(settings))
    if settings.runner == "pooling":
        return _pooled(model, settings, Forecast(memory=memory, runtime=runtime, weights=weights, wanted=wanted))
    activations = model.step_bytes(settings) + _pooling_too(model, settings, wanted)
    activations += (settings.lora_cache_bytes if settings.enable_lora else 0) + settings.tier_bytes
    kv_per_token = KVCache.bytes_per_block(spec, 1, kv_dtype_of(settings.kv_dtype, dtype))
    per_block = max(1, kv_per_token * settings.block_size)
    left = memory - runtime - weights - activations - per_block  # the block that is nobody's
    one = -(-wanted // settings.block_size)  # blocks of one request of full context
    if settings.num_blocks is not None:
        blocks = settings.num_blocks
    elif settings.kv_cache_memory_bytes is not None:
        blocks = settings.kv_cache_memory_bytes // per_block
    else:
        share = int(left * HALF) // per_block
        blocks = min(one * settings.max_num_seqs, max(one, share))
    if blocks * per_block > left:
        blocks = 0
    return Forecast(
        memory=memory,
        runtime=runtime,
        weights=weights,
        activations=activations,
        kv_per_token=kv_per_token,
        block_size=settings.block_size,
        blocks=max(0, blocks),
        wanted=wanted,
    )


def _pooled(model: _Model, settings: EngineConfig, found: Forecast) -> Forecast:
    """The sum of an engine without a cache: a step of whole texts, and one layer's keys and values of them."""
    tokens = step_tokens(settings, found.wanted)
    scratch = 8 * (2 * tokens) * max((layer.mixer.kv_width for layer in model.spec.layers), default=0)
    step = model.step_bytes(replace(settings, max_num_batched_tokens=tokens, runner="pooling"))
    return replace(found, activations=step + scratch, pooling=True)


def _pooling_too(model: _Model, settings: EngineConfig, wanted: int) -> int:
    """What embeddings take beside generation."""
    if settings.convert == "none":
        return 0
    return _pooled(model, settings, Forecast(memory=0, runtime=0, weights=0, wanted=wanted)).activations


def _enough(found: Forecast) -> bool:
    return (found.pooling or found.blocks > 0) and found.total <= found.memory


def weight_bytes(spec: ModelSpec, dtype: torch.dtype, quantized: Mapping[str, Format] | str | None = None) -> int:
    """Exactly what the decoder's parameters and buffers take, counted on a decoder that takes no memory.

    `quantized` is the format of each quantized place, or the name of one format for all that can be.
    """
    decoder = empty_decoder(spec, dtype, quantized)
    return sum(t.numel() * t.element_size() for t in (*decoder.parameters(), *decoder.buffers()))


def draft_bytes(settings: EngineConfig) -> int:
    """What the weights of a draft model take beside the model's own, 0 without one."""
    draft = settings.speculative
    if draft.model is None:
        return 0
    dtype = resolve(EngineConfig(dtype=draft.dtype, device=settings.device), draft.model).dtype
    return weight_bytes(read_spec(draft.model), DTYPES[dtype], read_formats(Path(draft.model), draft.quantization))


def empty_decoder(
    spec: ModelSpec, dtype: torch.dtype, quantized: Mapping[str, Format] | str | None, max_len: int | None = None
) -> Decoder:
    """A decoder that takes no memory."""
    decoder = Decoder(spec, dtype=dtype, device="meta", max_len=max_len)
    if quantized:
        prepare(decoder, formats(decoder, quantized) if isinstance(quantized, str) else quantized)
    return decoder


def program_bytes(
    spec: ModelSpec, settings: EngineConfig, quantized: Mapping[str, Format] | str | None = None
) -> tuple[int, int, int] | None:
    """What a compiled program works in: bytes at any rate, for each token of the budget, and for each row of logits.

    None where the decoder is not compiled.
    """
    decoder = empty_decoder(spec, DTYPES[settings.dtype], quantized, settings.max_model_len)
    if settings.device != "cpu" or why_not(decoder, "cpu"):
        return None
    if settings.enable_lora:
        Slots(decoder, settings.max_loras, settings.max_lora_rank)
    least, token, row = (working_bytes(decoder, *size) for size in ((1, 1), (2, 1), (2, 2)))
    return 2 * least - row, token - least, row - token


def rows_at_once(tokens: int, vocab: int) -> int:
    """How many rows of logits a step holds at once: the head's weights are read once for as many."""
    return max(1, min(tokens, LOGITS_AT_ONCE // vocab))


def step_bytes(spec: ModelSpec, settings: EngineConfig) -> int:
    """A bound on what one step holds at its widest moment, when the token budget and all request slots are full, of a
    decoder whose layers run one kernel at a time.

    Everything is counted in fp32. What lives through a layer is added to the widest of its parts; row counts are padded
    by at most a third (`kernels/rows.py`), queries that walk together by at most double (`engine/paged.py`).
    """
    T = -(-settings.max_num_batched_tokens * 4 // 3)
    R = min(settings.max_num_seqs, settings.max_num_batched_tokens)
    context = settings.max_model_len or spec.max_len
    stream = 3 * T * spec.hidden  # residual stream, its norm, and a part's output
    layers = set(spec.layers)
    widest = max((max(_attention(layer, T, R), _feed_forward(layer, T, spec.hidden)) for layer in layers), default=0)
    masks = _masks(layers, T, -(-context // KEYS))
    rows = min(R, max(1, NUMBERS_AT_ONCE // spec.vocab))
    logits = 7 * rows * spec.vocab  # logits, a working copy, sorted values and their int64 places, probabilities
    return 4 * (stream + max(widest, logits)) + masks


def _attention(layer: LayerSpec, T: int, R: int) -> int:
    """Numbers held while one layer's attention runs: q, k, v and their turned copies, the walk, one block of keys."""
    mixer = layer.mixer
    projections = 3 * T * (mixer.q_width + 2 * mixer.kv_width)
    walk = 2 * T * (5 * mixer.q_width + 6 * mixer.heads)  # grouped queries, folded values old and new, their sums
    scores = 2 * T * mixer.heads * KEYS * 3
    gathered = 4 * R * mixer.kv_width * KEYS
    return projections + walk + scores + gathered


def _feed_forward(layer: LayerSpec, T: int, hidden: int) -> int:
    """Numbers held while one layer's feed-forward runs."""
    match layer.ffn:
        case Mixture() as ffn:
            shared = 6 * T * ffn.shared_width if ffn.shared_width else 0
            return max(6 * T * ffn.width, shared) + 4 * T * hidden + 4 * T * ffn.experts
        case Gated() as ffn:
            return 6 * T * ffn.width + T * hidden
        case ffn:
            return 5 * T * ffn.width + T * hidden


def _masks(layers: set[LayerSpec], T: int, steps: int) -> int:
    """Bytes of the masks that one step keeps: for each query and key one int64 distance, and one flag, or one a head
    where the layer is sparse (and six more while it is made).

    Without windows, ALiBi and sparse layouts, only the blocks that a chunk itself stands in need a mask.
    """
    kinds = {(mixer.window, mixer.sparse): mixer.heads if mixer.sparse else 0 for mixer in (x.mixer for x in layers)}
    everywhere = set(kinds) != {(None, None)} or any(isinstance(layer.mixer.position, Alibi) for layer in layers)
    kept = steps if everywhere else min(steps, T // KEYS + 2)
    return sum(2 * T * KEYS * ((9 + heads) * kept + 16 + 6 * heads) for heads in kinds.values())


def _fix(model: _Model, settings: EngineConfig, memory: int) -> str:
    """What would fit: the least change of one setting, tried from the gentlest to the harshest."""
    found = _sum(model, settings, memory)
    needs = found.runtime + found.weights + found.activations + found.wanted * found.kv_per_token
    lead = f"needs {_mib(needs)} for one request of {found.wanted} tokens, and {_mib(memory)} is free"
    for change, words in gentler(settings, found, memory, rounds=not model.formats and not settings.quantization):
        if _enough(_sum(model, change, memory)):
            return f"{lead}: {words}"
    smallest = replace(settings, max_num_batched_tokens=16, max_num_seqs=1, max_model_len=settings.block_size)
    least = _sum(model, replace(smallest, num_blocks=1, kv_cache_memory_bytes=None), memory)
    floor = least.runtime + least.weights + least.activations
    return f"{lead}: no setting fits; free {_mib(floor - memory)} more or choose a smaller model"


def _mib(count: int) -> str:
    return f"{count / 2**20:,.0f} MiB" if count < 2**33 else f"{count / 2**30:,.1f} GiB"
