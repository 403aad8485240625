"""RewardModel: what a score head says of whole texts, whatever texts it is asked about with them.

    texts     5 7 7 1 0 0 │ 5 3 │ 5 9 9 2 4      0: padding, which says nothing
    packed    5 7 7 1 5 3 5 9 9 2 4              no padding and no batch axis
    scores          ▲   ▲         ▲              of each text's last token

A text's score has the same bits alone and among others: so two runs that share prompts in another way judge alike.

Shapes: T tokens, S sequences, D hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..core import ConfigError, RequestError
from ..models.decoder import Decoder
from ..models.packed import PackedContext
from ..models.scoring import reward_architecture
from ..models.weights import load, read_config

TOKENS = 8192
"""Of one forward pass, where a single text is not longer."""


def padding(config: Mapping[str, Any]) -> int | None:
    """The id of padding that a config.json names, if it does."""
    pad = config.get("pad_token_id")
    return pad if isinstance(pad, int) and pad >= 0 else None


def read_length(ids: Sequence[int], pad: int | None) -> int:
    """How many tokens of a text are read: all but the padding behind it; of nothing but padding, one.

    Where padding is also what ends a text (many models have one id for both) the end is not read, in training either.
    """
    end = len(ids)
    while end > 1 and ids[end - 1] == pad:
        end -= 1
    return end


class RewardModel:
    """A decoder with a score head of one label, over lists of token ids.

    `pad` is the id of padding: what a text ends in of it is not read, as transformers has it. `tokens` bounds a forward
    pass; its size changes no score.

    Raises:
        ConfigError: a decoder without a score head, or with one of several labels.
    """

    def __init__(self, decoder: Decoder, *, pad: int | None = None, tokens: int = TOKENS) -> None:
        spec = decoder.spec
        if spec.score is None:
            raise ConfigError(
                f"{spec.architecture} has no score head: give a reward model, a "
                f'{reward_architecture(spec.architecture)} such as `twofold align` makes with algorithm = "reward"'
            )
        if spec.score != 1:
            raise ConfigError(f"{spec.architecture} has {spec.score} labels; a reward is one number: give one with one")
        self.decoder, self.pad, self.tokens = decoder, pad, tokens

    @classmethod
    def load(
        cls, path: str | Path, *, dtype: torch.dtype = torch.float32, device: str = "cpu", tokens: int = TOKENS
    ) -> RewardModel:
        """A directory as transformers and Twofold write it; its config says what padding is.

        Raises:
            CheckpointError: a directory that cannot be read as it stands.
            ConfigError: not a reward model.
        """
        pad, decoder = padding(read_config(path)), load(path, dtype=dtype, device=device)
        return cls(decoder, pad=pad, tokens=tokens)

    @torch.no_grad()
    def __call__(self, texts: Sequence[Sequence[int]]) -> list[float]:
        """A score for each text, in order.

        Raises:
            RequestError: a text that is empty, longer than the model's context, or of ids that it does not have.
        """
        kept = [self._read(number, ids) for number, ids in enumerate(texts)]
        found: list[float] = []
        for part in self._parts(kept):
            ids_T = torch.tensor([token for ids in part for token in ids], device=self.decoder.device)
            lengths_S = torch.tensor([len(ids) for ids in part], device=self.decoder.device)
            context = PackedContext([len(ids) for ids in part], self.decoder.device)
            last_SD = self.decoder(ids_T, context)[lengths_S.cumsum(0) - 1]
            found += self.decoder.scores(last_SD)[:, 0].tolist()
        return found

    def _read(self, number: int, ids: Sequence[int]) -> Sequence[int]:
        spec, end = self.decoder.spec, read_length(ids, self.pad)
        if not 0 < end <= self.decoder.max_len:
            raise RequestError(f"text {number} has {end} tokens; this reward model reads 1 to {self.decoder.max_len}")
        if not 0 <= min(ids) <= max(ids) < spec.vocab:
            raise RequestError(f"text {number} has ids that this reward model does not: it knows 0 to {spec.vocab - 1}")
        return ids[:end]

    def _parts(self, texts: Sequence[Sequence[int]]) -> Iterator[list[Sequence[int]]]:
        """Texts in order, as many at a time as `tokens` allow, one at least."""
        part: list[Sequence[int]] = []
        size = 0
        for ids in texts:
            if part and size + len(ids) > self.tokens:
                yield part
                part, size = [], 0
            part.append(ids)
            size += len(ids)
        if part:
            yield part
