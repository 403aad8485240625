"""Reader: config.json with a memory. A key that nobody reads is an error, because a dropped setting is a wrong model.

Keys fall in three groups:

    read       a family asked for it
    BOOKKEEPING  says nothing about a forward pass in inference: who made it, dropout, initialisation, sampling defaults
    FIXED      means another model unless it has its usual value, e.g. `add_cross_attention: true`

Anything else is named in a CheckpointError.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, TypeVar, cast, overload

from ..core.errors import CheckpointError, unknown
from .spec import Activation

log = logging.getLogger(__name__)

T = TypeVar("T")

_BOOKKEEPING = {
    "who made it, when, how it is stored": """
        architectures model_type transformers_version torch_dtype dtype _name_or_path name_or_path auto_map
        tokenizer_class model_max_length max_sequence_length seq_length n_ctx prefix transformers.js_config
        is_llama_config unsloth_fixed unsloth_version""",
    "other tasks' heads, and outputs that nobody asks for": """
        id2label label2id num_labels problem_type finetuning_task task_specific_params output_attentions
        output_hidden_states output_router_logits output_past return_dict use_return_dict tie_last_hidden_states
        summary_type summary_use_proj summary_activation summary_proj_to_labels summary_first_dropout
        classifier_dropout is_decoder sentence_transformers sbert_ce_default_activation_function
        matryoshka_dimensions is_matryoshka""",
    "training only": """
        initializer_range initializer_factor init_std attention_dropout attention_probs_dropout_prob hidden_dropout
        hidden_dropout_prob dropout activation_dropout layerdrop resid_pdrop embd_pdrop attn_pdrop residual_dropout
        embedding_dropout router_aux_loss_coef router_jitter_noise gradient_checkpointing pretraining_tp""",
    "how, not what: kernels, caches, a softmax that is always float32 here": """
        use_cache cache_implementation attn_implementation _attn_implementation _attn_implementation_autoset
        _attn_implementation_internal use_flash_attn flash_attn torchscript use_bfloat16 slow_but_exact
        reorder_and_upcast_attn attention_softmax_in_fp32 scale_attention_softmax_in_fp32 bias_dropout_fusion
        masked_softmax_fusion skip_bias_add skip_bias_add_qkv offset_alibi""",
    "ids and sampling defaults: the tokenizer's and the request's business": """
        bos_token_id eos_token_id pad_token_id unk_token_id sep_token_id mask_token_id decoder_start_token_id
        max_length min_length max_new_tokens do_sample early_stopping num_beams num_beam_groups diversity_penalty
        temperature top_k top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size
        encoder_no_repeat_ngram_size bad_words_ids num_return_sequences output_scores return_dict_in_generate
        forced_bos_token_id forced_eos_token_id remove_invalid_values exponential_decay_length_penalty
        suppress_tokens begin_suppress_tokens""",
}
BOOKKEEPING = frozenset(key for keys in _BOOKKEEPING.values() for key in keys.split())

FIXED: dict[str, tuple[Any, ...]] = {
    "is_encoder_decoder": (False, None),
    "add_cross_attention": (False, None),
    "cross_attention_hidden_size": (None,),
    "tie_encoder_decoder": (False, None),
    "use_bidirectional_attention": (False, None),
    "chunk_size_feed_forward": (0, None),
    "pruned_heads": ({}, None),
    "per_layer_config": ({}, None),
    "quantization_config": ({}, None),
    "rope_interleaved": (False, None),
    "use_mrope": (False, None),
    "apply_residual_connection_post_layernorm": (False, None),
}

ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "quick_gelu": "gelu_quick",
    "relu": "relu",
    "relu2": "relu2",
}

_REQUIRED: Any = object()


class Reader:
    """A checkpoint's settings, read by type; `finish` refuses what was left unread.

    `where` prefixes keys in messages, for tables inside the table.
    """

    def __init__(self, config: Mapping[str, Any], where: str = "") -> None:
        self._config = config
        self._where = where
        self._read: set[str] = set()

    @overload
    def get(self, kind: type[T], *keys: str) -> T: ...
    @overload
    def get(self, kind: type[T], *keys: str, default: None) -> T | None: ...
    @overload
    def get(self, kind: type[T], *keys: str, default: T) -> T: ...
    def get(self, kind: type[T], *keys: str, default: T | None = _REQUIRED) -> T | None:
        """The value under whichever of `keys` (aliases) is there; an absent or null key is `default`.

        Raises:
            CheckpointError: the key is required and absent, has the wrong type, or two aliases disagree.
        """
        self._read.update(keys)
        found = {key: self._config[key] for key in keys if self._config.get(key) is not None}
        values = [self._convert(kind, key, value) for key, value in found.items()]
        if any(value != values[0] for value in values):
            raise CheckpointError(f"config.json: {' and '.join(found)} are one setting but differ: {values}")
        if values:
            return values[0]
        if default is _REQUIRED:
            raise CheckpointError(f"config.json lacks '{self._where}{keys[0]}'")
        return default

    def nullable(self, kind: type[T], key: str, *, default: T | None) -> T | None:
        """Like `get`, but null says None where an absent key says `default` (Mistral's sliding_window)."""
        self._read.add(key)
        if key in self._config and self._config[key] is None:
            return None
        return self.get(kind, key, default=default)

    def size(self, *keys: str, default: int | None = _REQUIRED) -> int:
        """A whole number of at least 1."""
        value = self.get(int, *keys, default=default)
        if value is None or value < 1:
            raise CheckpointError(f"config.json: '{self._where}{keys[0]}' must be at least 1, not {value}")
        return value

    def act(self, *keys: str, default: str = _REQUIRED) -> Activation:
        """The name of an activation, in our spelling."""
        name = self.get(str, *keys, default=default)
        if name not in ACTIVATIONS:
            raise CheckpointError(f"config.json: '{keys[0]}': " + unknown("activation", name, ACTIVATIONS))
        return ACTIVATIONS[name]

    def expect(self, key: str, *allowed: Any) -> None:
        """A key whose other values would be another model than the one we build."""
        self._read.add(key)
        if key in self._config and self._config[key] not in allowed:
            raise CheckpointError(
                f"config.json: '{self._where}{key}' is {self._config[key]!r}; Twofold builds this family only with "
                + " or ".join(repr(a) for a in allowed)
            )

    def ignore(self, *keys: str) -> None:
        """Keys of this family that say nothing about inference."""
        self._read.update(keys)

    def finish(self) -> None:
        """Refuse keys that nobody read.

        Raises:
            CheckpointError: naming each unread key, or a fixed key with another value.
        """
        for key, allowed in FIXED.items():
            if key not in self._read:
                self.expect(key, *allowed)
        if self._config.get("auto_map"):
            log.info("config.json names its own code (auto_map); Twofold never runs it")
        unread = sorted(set(self._config) - self._read - BOOKKEEPING)
        if unread:
            names = ", ".join(f"'{self._where}{key}'" for key in unread)
            raise CheckpointError(
                f"config.json: nothing reads {names}. A setting that is dropped is a wrong model: remove the key if it "
                "has no effect, or teach this family to read it"
            )

    def _convert(self, kind: type[T], key: str, value: Any) -> T:
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            return cast(T, float(value))
        if kind is int and isinstance(value, float) and value.is_integer():
            return cast(T, int(value))
        if not isinstance(value, kind) or (kind in (int, float) and isinstance(value, bool)):
            names = {int: "a whole number", float: "a number", bool: "true or false", str: "a string", list: "a list"}
            raise CheckpointError(
                f"config.json: '{self._where}{key}' must be {names.get(kind, 'a table')}, not {value!r}"
            )
        return value
