"""Pooler: from the hidden states of whole texts to vectors and scores; a text's numbers are its own, bit for bit.

    hidden   5 7 7 1 │ 5 3 │ 5 9 9      the step's tokens, text after text
    last           ▲     ▲       ▲      cls: the first of each
    mean     (5+7)+(7+1)  5+3  (5+9)+9  neighbours first, then sums of those: one order for a length

Shapes: T tokens, S texts, D hidden size, L labels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ..kernels.activation import activate
from ..kernels.linear import linear
from ..kernels.norm import rms_norm
from ..models.decoder import Decoder
from ..models.sentences import Sentences, read_sentences
from ..models.spec import ModelSpec
from ..models.weights import read_config
from .vectors import Abilities, Pooled, Pooling, Task

Activation = Literal["none", "sigmoid", "softmax"]

_TINY = 1e-24  # below the mean of squares, so that a vector of zeros stays one
_PROBLEMS: dict[str, Activation] = {
    "regression": "none",
    "single_label_classification": "softmax",
    "multi_label_classification": "sigmoid",
}
_NAMED: dict[str, Activation] = {"Identity": "none", "Sigmoid": "sigmoid", "Softmax": "softmax"}


def tasks_of(spec: ModelSpec) -> tuple[Task, ...]:
    """What a model's head is for: labels where it has a score head and no other, else vectors."""
    if not spec.score or spec.head:
        return "embed", "token_embed"
    of = spec.score_input.of
    return ("token_classify",) if of == "each" else ("classify", "token_classify") if of == "last" else ("classify",)


def activation_of(spec: ModelSpec, config: Mapping[str, Any]) -> Activation:
    """What stands behind a score head: as a cross-encoder's config names it, or by `problem_type`.

    Of a config that says neither: a decoder's one score is a reward, left as it is; an encoder's one is a probability;
    of several, one is right.
    """
    theirs = config.get("sentence_transformers") or {}
    named = theirs.get("activation_fn") or config.get("sbert_ce_default_activation_function")
    if isinstance(named, str) and named.rpartition(".")[2] in _NAMED:
        return _NAMED[named.rpartition(".")[2]]
    problem = config.get("problem_type")
    if isinstance(problem, str) and problem in _PROBLEMS:
        return _PROBLEMS[problem]
    if spec.score == 1:
        return "sigmoid" if spec.encoder else "none"
    return "softmax"


def labels_of(spec: ModelSpec, config: Mapping[str, Any]) -> tuple[str, ...]:
    """The labels' names, in order."""
    names = config.get("id2label") or {}
    return tuple(str(names.get(str(i), f"LABEL_{i}")) for i in range(spec.score or 0))


class Pooler:
    """What is made of a decoder's hidden states; `config` is the checkpoint's, for the labels' names."""

    def __init__(self, decoder: Decoder, sentences: Sentences, config: Mapping[str, Any] | None = None) -> None:
        spec = decoder.spec
        self.decoder, self.sentences = decoder, sentences
        self.activation = activation_of(spec, config or {})
        tasks = tasks_of(spec)
        self.abilities = Abilities(
            generates=False,
            tasks=tasks,
            types=spec.embedding.types or 1,
            width=sentences.width(spec.hidden) if "embed" in tasks else 0,
            labels=() if "embed" in tasks else labels_of(spec, config or {}),
            paired="classify" in tasks and spec.score == 1,
            prompt=sentences.prompt,
            similarity=sentences.similarity,
        )

    @classmethod
    def load(cls, decoder: Decoder, folder: str | Path, pooling: str = "auto") -> Pooler:
        """As the checkpoint in `folder` says.

        Raises:
            CheckpointError: it says what Twofold does not do.
        """
        sentences = read_sentences(folder, encoder=decoder.spec.encoder, pooling=pooling)
        return cls(decoder, sentences, read_config(folder))

    def __call__(self, hidden_TD: Tensor, lengths: Sequence[int], asked: Sequence[Pooling]) -> list[Pooled]:
        """One answer for each text, in order."""
        out: list[Pooled | None] = [None] * len(lengths)
        ends = list(accumulate(lengths))
        for task in dict.fromkeys(pooling.task for pooling in asked):
            chosen = [number for number, pooling in enumerate(asked) if pooling.task == task]
            pieces = [range(ends[number] - lengths[number], ends[number]) for number in chosen]
            if task == "embed":
                made = self._embed(hidden_TD, pieces, [asked[number] for number in chosen])
            elif task == "classify":
                made = self._classify(hidden_TD, pieces, [asked[number] for number in chosen])
            else:
                made = [
                    self._each(hidden_TD[piece.start : piece.stop], asked[number])
                    for number, piece in zip(chosen, pieces, strict=True)
                ]
            for number, pooled in zip(chosen, made, strict=True):
                out[number] = pooled
        return [pooled for pooled in out if pooled is not None]

    def _embed(self, hidden_TD: Tensor, pieces: Sequence[range], asked: Sequence[Pooling]) -> list[Pooled]:
        x_SD = pool(hidden_TD, pieces, self.sentences.pooling).float()
        for dense in self.sentences.dense:
            x_SD = linear(
                x_SD, dense.weight.to(x_SD.device), None if dense.bias is None else dense.bias.to(x_SD.device)
            )
            if dense.act == "tanh":
                x_SD = torch.tanh(x_SD.contiguous())
            elif dense.act != "none":
                x_SD = activate(x_SD, dense.act)
        out: dict[int, Pooled] = {}
        for cut, unit in dict.fromkeys(self._cut(pooling) for pooling in asked):
            rows = [row for row, pooling in enumerate(asked) if self._cut(pooling) == (cut, unit)]
            part_SD = x_SD[torch.tensor(rows, device=x_SD.device), :cut]
            out |= zip(rows, _each_packed(normalized(part_SD) if unit else part_SD), strict=True)
        return [out[row] for row in range(len(asked))]

    def _cut(self, asked: Pooling) -> tuple[int, bool]:
        """How many numbers of a vector are wanted, and whether they are to have length 1: a cut one has lost it."""
        width = self.abilities.width
        kept = width if asked.dimensions is None else asked.dimensions
        usual = self.sentences.normalize or kept < width
        return kept, usual if asked.normalize is None else asked.normalize

    def _classify(self, hidden_TD: Tensor, pieces: Sequence[range], asked: Sequence[Pooling]) -> list[Pooled]:
        of = self.decoder.spec.score_input.of
        assert of != "each", "such a head is asked of each token"
        scores_SL = self.decoder.scores(pool(hidden_TD, pieces, of))
        return [_packed(self._active(row_L, pooling)) for row_L, pooling in zip(scores_SL, asked, strict=True)]

    def _each(self, hidden_TD: Tensor, asked: Pooling) -> Pooled:
        if asked.task == "token_embed":
            return _packed(normalized(hidden_TD.float()) if asked.normalize else hidden_TD)
        scores_TL = self.decoder.scores(hidden_TD)
        return _packed(torch.stack([self._active(row_L, asked) for row_L in scores_TL]))

    def _active(self, x_L: Tensor, asked: Pooling) -> Tensor:
        """One row at a time: its bits hang on no other."""
        if not asked.activate or self.activation == "none":
            return x_L
        return torch.softmax(x_L, -1) if self.activation == "softmax" else 1.0 / (1.0 + torch.exp(-x_L.contiguous()))


def pool(hidden_TD: Tensor, pieces: Sequence[range], how: Literal["last", "mean", "cls"]) -> Tensor:
    """One row [S, D] of each piece of the hidden states."""
    if how == "mean":
        return mean(hidden_TD, pieces)
    rows = [piece.stop - 1 if how == "last" else piece.start for piece in pieces]
    return hidden_TD[torch.tensor(rows, device=hidden_TD.device)]


def mean(hidden_TD: Tensor, pieces: Sequence[range]) -> Tensor:
    """The mean [S, D] of each piece, its rows added as a tree that its length alone decides."""
    where = torch.tensor([row for piece in pieces for row in piece], device=hidden_TD.device)
    x, lengths = hidden_TD[where].float(), [len(piece) for piece in pieces]
    while max(lengths) > 1:
        firsts = list(accumulate(lengths, initial=0))
        even = [row for first, length in zip(firsts, lengths) for row in range(first, first + length, 2)]
        odd = [row for first, length in zip(firsts, lengths) for row in range(first + 1, first + length, 2)]
        lengths = [-(-length // 2) for length in lengths]
        place = {row: at for at, row in enumerate(even)}
        onto = torch.tensor([place[row - 1] for row in odd], device=x.device)
        half = x[torch.tensor(even, device=x.device)]
        half[onto] = half[onto] + x[torch.tensor(odd, device=x.device)]
        x = half
    return x / torch.tensor([[len(piece)] for piece in pieces], dtype=x.dtype, device=x.device)


def normalized(x_SD: Tensor) -> Tensor:
    """Each row divided by its length, the sum of squares in the order of all our norms."""
    return rms_norm(x_SD.contiguous(), None, _TINY) / math.sqrt(x_SD.shape[-1])


def _packed(x: Tensor) -> Pooled:
    return _each_packed(x[None])[0]


def _each_packed(x: Tensor) -> list[Pooled]:
    """The numbers of each row of some shape."""
    shape, numbers = tuple(x.shape[1:]), x.detach().to("cpu", torch.float32).contiguous().numpy().astype("<f4")
    return [Pooled(shape, row.tobytes()) for row in numbers]
