"""Every encoder against transformers: hidden states, scores, token types, checkpoints there and back, bits."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from tests.parity import encoder_zoo as zoo
from twofold.core import CheckpointError, ConfigError
from twofold.kernels.paged import Panels
from twofold.models import Decoder, PackedContext, load, read_config, save
from twofold.models.compile import Program, Spans, why_not
from twofold.models.families import ENCODERS

TOLERANCE = 2e-4
LENGTHS = (40, 1, 139, 17)


@dataclass(frozen=True)
class Pair:
    """One variant in both libraries."""

    path: Path
    theirs: transformers.PreTrainedModel
    ours: Decoder
    texts: list[list[int]]


@pytest.fixture(scope="module", params=sorted(zoo.ZOO))
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    variant = zoo.ZOO[request.param]
    path = tmp_path_factory.mktemp("encoders")
    theirs = zoo.save(variant, path)
    return Pair(path, theirs, load(path), zoo.texts_of(variant, *LENGTHS))


def hidden(decoder: Decoder, texts: list[list[int]], types: list[list[int]] | None = None) -> tuple[torch.Tensor, ...]:
    ids_T = torch.tensor([token for ids in texts for token in ids])
    types_T = None if types is None else torch.tensor([kind for row in types for kind in row])
    lengths = [len(ids) for ids in texts]
    with torch.no_grad():
        return decoder(ids_T, PackedContext(lengths), types_T).split(lengths)


def test_the_zoo_has_every_encoder() -> None:
    assert {variant.architecture for variant in zoo.ZOO.values()} == set(ENCODERS)


def test_hidden_states(pair: Pair) -> None:
    for ids, ours in zip(pair.texts, hidden(pair.ours, pair.texts), strict=True):
        with torch.no_grad():
            theirs = pair.theirs.base_model(torch.tensor([ids])).last_hidden_state[0]
        assert theirs.std() > 0.05
        assert (ours - theirs).abs().max() < TOLERANCE


def test_token_types(pair: Pair) -> None:
    kinds = pair.ours.spec.embedding.types
    if not kinds or kinds == 1:
        return
    types = [[i * kinds // len(ids) for i in range(len(ids))] for ids in pair.texts]
    for ids, row, ours in zip(pair.texts, types, hidden(pair.ours, pair.texts, types), strict=True):
        with torch.no_grad():
            told = {"token_type_ids": torch.tensor([row])}
            theirs = pair.theirs.base_model(torch.tensor([ids]), **told).last_hidden_state[0]
        assert (ours - theirs).abs().max() < TOLERANCE


def test_scores(pair: Pair) -> None:
    spec = pair.ours.spec
    if not spec.score:
        with pytest.raises(ConfigError, match="no score head"):
            pair.ours.scores(torch.zeros(1, spec.hidden))
        return
    pooled = {"cls": lambda x: x[:1], "mean": lambda x: x.mean(0, keepdim=True), "each": lambda x: x}
    for ids, x in zip(pair.texts, hidden(pair.ours, pair.texts), strict=True):
        with torch.no_grad():
            theirs = pair.theirs(torch.tensor([ids])).logits[0]
            ours = pair.ours.scores(pooled[spec.score_input.of](x))
        assert theirs.abs().max() > 20 * TOLERANCE
        assert (ours - theirs).abs().max() < TOLERANCE


def test_export_is_what_transformers_loads(pair: Pair, tmp_path: Path) -> None:
    save(pair.ours, tmp_path, config=read_config(pair.path), shard_bytes=40_000)
    back, info = type(pair.theirs).from_pretrained(tmp_path, output_loading_info=True)
    bare = pair.theirs.base_model is pair.theirs
    unread = {"pooler.dense.weight", "pooler.dense.bias"} if bare else set()
    assert set(info["missing_keys"]) <= unread and not info["unexpected_keys"] and not info["mismatched_keys"]
    expected, found = pair.theirs.state_dict(), back.state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected.keys() - unread)


def test_a_text_has_the_same_bits_alone_and_among_others(pair: Pair) -> None:
    together = hidden(pair.ours, pair.texts)
    for ids, among in zip(pair.texts, together, strict=True):
        assert torch.equal(hidden(pair.ours, [ids])[0], among)
    turned = hidden(pair.ours, pair.texts[::-1])
    assert all(torch.equal(a, b) for a, b in zip(reversed(turned), together, strict=True))


def test_a_compiled_program_has_the_same_bits(pair: Pair) -> None:
    assert why_not(pair.ours) == ""
    mixer = pair.ours.spec.layers[0].mixer
    blocks = [-(-length // 16) for length in LENGTHS]
    scratch = Panels.zeros(sum(blocks), mixer.kv_heads, 16, mixer.head_dim)
    program = Program(pair.ours, [scratch.struct()] * len(pair.ours.layers), tokens=sum(LENGTHS), rows=1)
    firsts = [sum(blocks[:i]) for i in range(len(blocks))]
    kinds = pair.ours.spec.embedding.types or 1
    types = [[i % kinds for i in range(length)] for length in LENGTHS]
    spans = Spans(
        ids=[token for ids in pair.texts for token in ids],
        starts=[0] * len(LENGTHS),
        counts=LENGTHS,
        blocks=[range(first, first + count) for first, count in zip(firsts, blocks, strict=True)],
        types=[kind for row in types for kind in row] if kinds > 1 else (),
    )
    found = program.run(spans).clone()
    assert torch.equal(found, torch.cat(hidden(pair.ours, pair.texts, types if kinds > 1 else None)))


def test_other_spellings_of_a_checkpoint(tmp_path: Path) -> None:
    """A bare model written with its classifier's prefix, and norms as the first checkpoints call them."""
    zoo.save(zoo.ZOO["bert"], tmp_path)
    before = load(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({"bert." + name: x for name, x in tensors.items()}, tmp_path / "model.safetensors")
    again = dict(load(tmp_path).named_parameters())
    assert all(torch.equal(again[name], x) for name, x in before.named_parameters())

    zoo.save(zoo.ZOO["bert-cross"], tmp_path)
    before, tensors = load(tmp_path), load_file(tmp_path / "model.safetensors")
    old = {
        name.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta"): x for name, x in tensors.items()
    }
    assert len(old.keys() - tensors.keys()) == 2 * (1 + 2 * 2)
    save_file(old, tmp_path / "model.safetensors")
    again = dict(load(tmp_path).named_parameters())
    assert all(torch.equal(again[name], x) for name, x in before.named_parameters())


@pytest.mark.parametrize(
    ("variant", "change", "match"),
    [
        ("bert", {"is_decoder": True}, "is_decoder"),
        ("bert", {"position_embedding_type": "relative_key"}, "position_embedding_type"),
        ("bert", {"sparse_attention": {"mode": "fixed"}}, "looks ahead"),
        ("bert-cross", {"num_labels": 4, "id2label": {"0": "a"}}, "make them agree"),
        ("modernbert", {"some_new_setting": 1}, "some_new_setting"),
        ("modernbert-mean", {"classifier_pooling": "max"}, "classifier_pooling"),
    ],
)
def test_what_would_be_another_model_is_refused(variant: str, change: dict, match: str, tmp_path: Path) -> None:
    zoo.save(zoo.ZOO[variant], tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(CheckpointError, match=match):
        load(tmp_path)


def test_an_encoder_makes_no_text(pair: Pair) -> None:
    assert pair.ours.spec.encoder
    with pytest.raises(ConfigError, match="is an encoder"):
        pair.ours.logits(torch.zeros(1, pair.ours.spec.hidden))
