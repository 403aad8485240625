"""ModelSpec: what a model is, as plain values. Printing a spec shows the model.

    ModelSpec
    ├── embedding   Embedding(scale, positions, types, norm, project)
    ├── layers      a LayerSpec each: mixer (Attention), ffn (Gated | Plain | Mixture), placement of the norms
    ├── norm        the last one
    ├── head        Head(tied, bias, multiplier, softcap); None in a reward model
    ├── score       how many numbers a score head gives for each token; None: there is none
    └── score_input what of a text a score head is for, and what stands before it

Residual styles, x the residual stream, n a norm, A attention, F feed-forward, m the residual multiplier:

    Pre           x += m·A(n1 x)            x += m·F(n2 x)
    PreFfn        x += m·A(x)               x += m·F(n2 x)            where the embedding was normed, ModernBERT's first
    Parallel      x += A(n1 x) + F(n2 x)    n2 is n1 when `shared`
    PostOutput    x += n1 A(x)              x += n2 F(x)              OLMo 2
    Sandwich      x += n2 A(n1 x)           x += n4 F(n3 x)           Gemma 2 and 3
    PostResidual  x = n1(x + A(x))          x = n2(x + F(x))          the first Transformer, BERT, OPT-350m

No torch here: a spec can be read, printed and reasoned about in milliseconds, and crosses processes as it is.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from ..core.errors import ConfigError
from ..core.sparse import Layout as SparseLayout

Activation = Literal["silu", "gelu", "gelu_tanh", "gelu_quick", "relu", "relu2"]


# --------------------------------------------------------------------------------------------- positions
@dataclass(frozen=True, kw_only=True, slots=True)
class LinearScaling:
    """Positions divided by `factor`."""

    factor: float


@dataclass(frozen=True, kw_only=True, slots=True)
class DynamicNtk:
    """The base grows with the position once it passes `original`; a position's angle depends on that position alone."""

    factor: float
    original: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Llama3Scaling:
    """Llama 3.1: long wavelengths divided by `factor`, short ones kept, a smooth ramp between."""

    factor: float
    low: float
    high: float
    original: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Yarn:
    """YaRN (Peng et al. 2023): interpolation by wavelength; an attention temperature multiplies cos and sin."""

    factor: float
    original: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True


@dataclass(frozen=True, kw_only=True, slots=True)
class LongRope:
    """LongRoPE (Phi-3): a divisor per frequency, `long` when the model is built for more than `original` positions."""

    short: tuple[float, ...]
    long: tuple[float, ...]
    original: int
    factor: float
    attention_factor: float | None = None


RopeScaling = LinearScaling | DynamicNtk | Llama3Scaling | Yarn | LongRope


@dataclass(frozen=True, kw_only=True, slots=True)
class Rope:
    """Rotary positions over the first `dim` of each head; `interleaved` turns neighbours, else the two halves."""

    theta: float
    dim: int
    interleaved: bool = False
    scaling: RopeScaling | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Alibi:
    """A penalty on distance, one slope a head (Press et al. 2021), multiplied by `scale`."""

    scale: float = 1.0

    def slopes(self, heads: int) -> tuple[float, ...]:
        """Powers of 2^(-8/n) for n the power of two below `heads`, then every other of the next series."""
        whole = 1 << (heads.bit_length() - 1)
        found = [2 ** (-8 * (i + 1) / whole) for i in range(whole)]
        found += [2 ** (-4 * (2 * i + 1) / whole) for i in range(heads - whole)]
        return tuple(self.scale * slope for slope in found)


# --------------------------------------------------------------------------------------------- parts
@dataclass(frozen=True, kw_only=True, slots=True)
class Norm:
    """`rms` or `layer`; `offset` multiplies by 1 + w; without `weight` it has no parameters."""

    kind: Literal["rms", "layer"]
    eps: float
    weight: bool = True
    bias: bool = False
    offset: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Attention:
    """Multi-head, grouped-query or multi-query attention.

    `qk_norm` works on each head (weight [D]), on each head with its own weight (weight [H, D]) or on the full width
    (weight [H*D]). `window` W lets position i see i-W+1 to i; `sparse` leaves out whole blocks of keys. `scale` None is
    1/sqrt(head_dim). Without `causal` what comes after is seen as well, within the window up to i+W-1: an encoder.
    """

    heads: int
    kv_heads: int
    head_dim: int
    scale: float | None = None
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: Literal["head", "per_head", "full"] | None = None
    qk_norm_kind: Norm | None = None
    position: Rope | Alibi | None = None
    window: int | None = None
    sparse: SparseLayout | None = None
    softcap: float | None = None
    clip_qkv: float | None = None
    causal: bool = True

    @property
    def q_width(self) -> int:
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        return self.kv_heads * self.head_dim

    def qk_norm_shape(self, heads: int) -> tuple[int, ...]:
        """The shape of the weight that normalises `heads` queries or keys."""
        shapes = {"per_head": (heads, self.head_dim), "full": (heads * self.head_dim,)}
        return shapes.get(self.qk_norm or "head", (self.head_dim,))


@dataclass(frozen=True, kw_only=True, slots=True)
class Gated:
    """down(act(gate x) * up x)."""

    width: int
    act: Activation
    bias: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Plain:
    """down(act(up x))."""

    width: int
    act: Activation
    bias: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Mixture:
    """`top_k` of `experts` gated feed-forwards of `width`.

    Their weights are softmaxed over all experts, and renormalised over the chosen when `renormalise`. With `biased` a
    number of each expert is added to its probability for the choice alone. A shared expert of `shared_width`, when
    there is one, is added, scaled by a sigmoid gate when `shared_gate`.
    """

    experts: int
    top_k: int
    width: int
    act: Activation
    renormalise: bool = True
    biased: bool = False
    shared_width: int | None = None
    shared_gate: bool = True


@dataclass(frozen=True, kw_only=True, slots=True)
class Pre:
    norm: Norm


@dataclass(frozen=True, kw_only=True, slots=True)
class PreFfn:
    norm: Norm


@dataclass(frozen=True, kw_only=True, slots=True)
class Parallel:
    norm: Norm
    shared: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class PostOutput:
    norm: Norm


@dataclass(frozen=True, kw_only=True, slots=True)
class Sandwich:
    norm: Norm


@dataclass(frozen=True, kw_only=True, slots=True)
class PostResidual:
    norm: Norm


Ffn = Gated | Plain | Mixture
Placement = Pre | PreFfn | Parallel | PostOutput | Sandwich | PostResidual


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerSpec:
    mixer: Attention
    ffn: Ffn
    norms: Placement
    residual: float = 1.0

    @property
    def norm_numbers(self) -> tuple[int, ...]:
        """The numbers of the norms that the layer has, apart from those of queries and keys."""
        match self.norms:
            case Sandwich():
                return 1, 2, 3, 4
            case Parallel(shared=True):
                return (1,)
            case PreFfn():
                return (2,)
        return 1, 2


@dataclass(frozen=True, kw_only=True, slots=True)
class Learned:
    """A table of `size` position vectors after `offset` unused ones (OPT has 2)."""

    size: int
    offset: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Embedding:
    """Token vectors times `scale`, plus learned positions, a norm, a projection from `project` to the hidden size.

    `types` is how many token types have a vector of their own, added to each token: which of two texts it is of.
    """

    scale: float = 1.0
    positions: Learned | None = None
    types: int | None = None
    norm: Norm | None = None
    project: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Head:
    """Hidden to vocabulary: logits times `multiplier`, then softcap * tanh(logits / softcap)."""

    tied: bool
    bias: bool = False
    multiplier: float = 1.0
    softcap: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoreInput:
    """What a score head reads of a text: its last token, its first (`cls`), the mean of all, or each of them.

    With `dense` that goes through a square matrix, `act` and `norm` first (BERT's pooler). `bias` is the head's own.
    """

    of: Literal["last", "cls", "mean", "each"] = "last"
    dense: bool = False
    dense_bias: bool = True
    act: Activation | Literal["tanh"] = "tanh"
    norm: Norm | None = None
    bias: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSpec:
    """One decoder. `max_len` is the context it was made for; `names` says how the checkpoint calls each tensor.

    A score head stands beside the language head (a critic that shares the policy's layers) or in its place (a reward
    model, for which `head` is None). A draft head `joins`: in the place of an embedding it has a matrix that takes
    another model's hidden state and the embedding of the token behind it (`draft_head.py`).
    """

    architecture: str
    hidden: int
    vocab: int
    layers: tuple[LayerSpec, ...]
    norm: Norm | None
    head: Head | None
    names: Names
    embedding: Embedding = field(default_factory=Embedding)
    max_len: int = 2048
    score: int | None = None
    score_input: ScoreInput = field(default_factory=ScoreInput)
    joins: bool = False

    def speaking(self) -> Head:
        """The language head.

        Raises:
            ConfigError: there is none: this is a reward model, an encoder, or a draft head.
        """
        if self.joins:
            raise ConfigError(
                "this is a draft head, which only guesses for the model that it was trained beside: give that model "
                'here, and this one as speculative.model with speculative.method "eagle"'
            )
        if self.head is None and self.encoder:
            raise ConfigError(
                f"{self.architecture} is an encoder: it makes embeddings or scores of texts, and no text. Give a "
                "causal model here, and serve this one for /v1/embeddings, /score, /rerank or /classify"
            )
        if self.head is None:
            raise ConfigError(
                f"{self.architecture} is a reward model: it scores texts, and has no language head to make any with. "
                "Give a causal model here, and this one as a reward to `twofold align`"
            )
        return self.head

    @property
    def encoder(self) -> bool:
        """Whether tokens see what comes after them, so that a text goes through whole or not at all."""
        return any(not layer.mixer.causal for layer in self.layers)

    @property
    def tied(self) -> bool:
        """Whether the embedding is also the language head."""
        return self.head is not None and self.head.tied

    @property
    def width(self) -> int:
        """Numbers of a token vector, and of what the heads read."""
        return self.embedding.project or self.hidden

    @property
    def ropes(self) -> tuple[Rope, ...]:
        """Every kind of rotation that a layer asks for, once."""
        found = (layer.mixer.position for layer in self.layers)
        return tuple(dict.fromkeys(position for position in found if isinstance(position, Rope)))

    @property
    def kv_width(self) -> int:
        """Numbers that one token keeps as keys and values over all layers; times the dtype's size it is bytes."""
        return sum(2 * layer.mixer.kv_width for layer in self.layers)


# --------------------------------------------------------------------------------------------- names
Layout = Literal["plain", "transposed", "headwise", "grouped"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Names:
    """How a checkpoint calls what the decoder calls `embed`, `layers.3.q` and so on; two-way and strict.

    `table` maps an inner name without `.weight` or `.bias` (with `{i}` for the layer and `{e}` for the expert) to the
    checkpoint's, e.g. "layers.{i}.q": "model.layers.{i}.self_attn.q_proj". Fused tensors are named as fused:
    "layers.{i}.qkv", "layers.{i}.gate_up". `layouts` says how a fused or transposed tensor lies in the file:

        plain       [out, in], parts one after another
        transposed  [in, out], GPT-2's Conv1D
        headwise    for each head its q, k, v (GPT-NeoX, BLOOM, old Falcon)
        grouped     for each key-value head its queries, then k, then v (Falcon 40B)

    A checkpoint's name with `{h}` is one tensor for each head. A key that ends in `.weight` maps that one tensor, whose
    name in the checkpoint is then written out in full. `also` has other names that are understood when reading (experts
    stored as one tensor), and `prefix` is one that checkpoints of the bare model lack ("model.", "transformer.").
    `ignore` lists tensors that carry no weight (old buffers such as "rotary_emb.inv_freq"), by suffix.
    """

    table: dict[str, str]
    layouts: dict[str, Layout] = field(default_factory=dict)
    also: dict[str, str] = field(default_factory=dict)
    prefix: str = ""
    ignore: tuple[str, ...] = ()
