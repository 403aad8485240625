"""Vectors, labels and scores against transformers, and a text's bits in any company."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers

from tests.parity.sentence_checkpoint import TEXTS, decoder, encoder, sentences
from twofold.core import ConfigError, RequestError
from twofold.engine.llm import LLM
from twofold.engine.pooler import mean

TOLERANCE = 2e-5


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def theirs_of(folder: Path) -> transformers.PreTrainedTokenizerFast:
    return transformers.PreTrainedTokenizerFast.from_pretrained(folder)


def states(model: transformers.PreTrainedModel, folder: Path, text: str) -> torch.Tensor:
    with torch.no_grad():
        return model.base_model(**theirs_of(folder)(text, return_tensors="pt")).last_hidden_state[0]


@pytest.mark.parametrize(
    ("variant", "mode"), [("bert", "cls_token"), ("bert", "mean_tokens"), ("modernbert", "lasttoken"),
                          ("roberta", "mean_tokens")]
)  # fmt: skip
def test_embeddings_as_the_checkpoint_pools(variant: str, mode: str, tmp_path: Path) -> None:
    model = encoder(tmp_path, variant)
    sentences(tmp_path, mode)
    how = {"cls_token": lambda x: x[0], "mean_tokens": lambda x: x.mean(0), "lasttoken": lambda x: x[-1]}[mode]
    for ours, text in zip(LLM(tmp_path).embed(TEXTS), TEXTS, strict=True):
        expected = torch.nn.functional.normalize(how(states(model, tmp_path, text)), dim=0)
        torch.testing.assert_close(torch.tensor(ours), expected, atol=TOLERANCE, rtol=0)


def test_a_dense_module_stands_behind_the_pooling(tmp_path: Path) -> None:
    model = encoder(tmp_path, "bert")
    linear = sentences(tmp_path, "mean_tokens", normalize=False, dense=(40, 24))
    assert linear is not None
    llm = LLM(tmp_path)
    assert llm.engine.abilities.width == 24
    for ours, text in zip(llm.embed(TEXTS), TEXTS, strict=True):
        expected = torch.tanh(linear(states(model, tmp_path, text).mean(0)))
        torch.testing.assert_close(torch.tensor(ours), expected.detach(), atol=TOLERANCE, rtol=0)


def test_a_decoder_pools_its_last_token(tmp_path: Path) -> None:
    model = decoder(tmp_path)
    llm = LLM(tmp_path, runner="pooling")
    for ours, text in zip(llm.embed(TEXTS), TEXTS, strict=True):
        expected = torch.nn.functional.normalize(states(model, tmp_path, text)[-1], dim=0)
        torch.testing.assert_close(torch.tensor(ours), expected, atol=TOLERANCE, rtol=0)
    mean_instead = LLM(tmp_path, runner="pooling", pooling="mean").embed(TEXTS[0])[0]
    expected = torch.nn.functional.normalize(states(model, tmp_path, TEXTS[0]).mean(0), dim=0)
    torch.testing.assert_close(torch.tensor(mean_instead), expected, atol=TOLERANCE, rtol=0)
    with pytest.raises(RequestError, match="no text"):
        llm.generate("the fox", progress=False)


def test_modules_json_makes_a_decoder_an_embedding_model(tmp_path: Path) -> None:
    decoder(tmp_path)
    assert LLM(tmp_path).engine.abilities.generates
    sentences(tmp_path, "lasttoken")
    assert not LLM(tmp_path).engine.abilities.generates
    assert LLM(tmp_path, runner="generate").engine.abilities.generates


def test_dimensions_cut_and_make_the_length_one_again(tmp_path: Path) -> None:
    encoder(tmp_path, "bert")
    llm = LLM(tmp_path)
    for whole, cut in zip(llm.embed(TEXTS), llm.embed(TEXTS, dimensions=16), strict=True):
        expected = torch.nn.functional.normalize(torch.tensor(whole[:16]), dim=0)
        torch.testing.assert_close(torch.tensor(cut), expected, atol=1e-6, rtol=0)
    with pytest.raises(RequestError, match="1 to 40"):
        llm.embed(TEXTS, dimensions=41)


@pytest.mark.parametrize(
    ("variant", "config", "active"),
    [
        ("bert-classifier", {}, lambda x: x.softmax(-1)),
        ("bert-classifier", {"problem_type": "multi_label_classification"}, torch.sigmoid),
        ("bert-classifier", {"problem_type": "regression"}, lambda x: x),
        ("roberta-classifier", {}, lambda x: x.softmax(-1)),
        ("modernbert-mean", {}, torch.sigmoid),
        ("bert-cross", {"sentence_transformers": {"activation_fn": "torch.nn.modules.linear.Identity"}}, lambda x: x),
    ],
)
def test_labels(variant: str, config: dict, active, tmp_path: Path) -> None:
    model = encoder(tmp_path, variant)
    path = tmp_path / "config.json"
    told = json.loads(path.read_text()) | config
    labels = model.config.num_labels
    told["id2label"] = {str(i): f"name {i}" for i in range(labels)}
    told.pop("label2id", None)
    path.write_text(json.dumps(told))
    for ours, text in zip(LLM(tmp_path).classify(TEXTS), TEXTS, strict=True):
        with torch.no_grad():
            expected = active(model(**theirs_of(tmp_path)(text, return_tensors="pt")).logits[0])
        assert list(ours) == [f"name {i}" for i in range(labels)]
        assert list(ours.values()) == pytest.approx(expected.tolist(), abs=TOLERANCE)


@pytest.mark.parametrize("variant", ["bert-cross", "xlm-roberta-cross"])
def test_a_cross_encoder_reads_two_texts_as_one(variant: str, tmp_path: Path) -> None:
    model = encoder(tmp_path, variant)
    theirs = theirs_of(tmp_path)
    found = LLM(tmp_path).score(TEXTS[0], TEXTS)
    for score, text in zip(found, TEXTS, strict=True):
        told = theirs(TEXTS[0], text, return_tensors="pt", return_token_type_ids=variant == "bert-cross")
        with torch.no_grad():
            assert score == pytest.approx(torch.sigmoid(model(**told).logits[0, 0]).item(), abs=TOLERANCE)
    assert len({round(score, 4) for score in found}) > 1


def test_other_models_compare_vectors(tmp_path: Path) -> None:
    encoder(tmp_path, "bert")
    llm = LLM(tmp_path)
    vectors = torch.tensor(llm.embed(TEXTS))
    assert llm.score(TEXTS[0], TEXTS) == pytest.approx((vectors @ vectors[0]).tolist(), abs=1e-5)
    assert llm.score(TEXTS[:2], TEXTS[2:]) == pytest.approx((vectors[:2] * vectors[2:]).sum(-1).tolist(), abs=1e-5)
    with pytest.raises(RequestError, match="as many on both sides"):
        llm.score(TEXTS[:2], TEXTS[:3])


def test_a_reward_model_scores_the_last_token(tmp_path: Path) -> None:
    model = decoder(tmp_path, "Qwen3ForSequenceClassification", num_labels=1)
    llm = LLM(tmp_path)
    for ours, text in zip(llm.classify(TEXTS), TEXTS, strict=True):
        with torch.no_grad():
            expected = model(**theirs_of(tmp_path)(text, return_tensors="pt")).logits[0, 0].item()
        assert ours["LABEL_0"] == pytest.approx(expected, abs=2e-4)  # raw: a reward is no probability
    with pytest.raises(RequestError, match="not embed"):
        llm.embed(TEXTS)


# ------------------------------------------------------------------------------------------------------------- bits
@pytest.mark.parametrize(
    ("variant", "mode"), [("bert", "mean_tokens"), ("modernbert", "cls_token"), ("bert-classifier", None)]
)
def test_a_text_has_the_same_bits_in_any_company(variant: str, mode: str | None, tmp_path: Path) -> None:
    encoder(tmp_path, variant)
    if mode:
        sentences(tmp_path, mode, dense=(40, 24))
    texts = [text[: 5 + 7 * i] for i, text in enumerate(TEXTS * 3)]

    def ask(llm: LLM, some: list[str]) -> list[list[float]]:
        return llm.embed(some) if mode else [list(labels.values()) for labels in llm.classify(some)]

    llm = LLM(tmp_path)
    together = ask(llm, texts)
    assert [ask(llm, [text])[0] for text in texts] == together
    assert ask(llm, texts[::-1])[::-1] == together
    assert ask(LLM(tmp_path, max_num_batched_tokens=16, max_num_seqs=4), texts) == together
    torch.set_num_threads(3)
    assert ask(llm, texts) == together


def test_the_mean_is_a_tree_of_the_length_alone() -> None:
    x = torch.randn(50, 9)
    pieces = [range(1), range(1, 20), range(20, 50), range(3, 8)]
    together = mean(x, pieces)
    for piece, row in zip(pieces, together, strict=True):
        assert torch.equal(mean(x[piece.start : piece.stop], [range(len(piece))])[0], row)
        torch.testing.assert_close(row, x[piece.start : piece.stop].mean(0))
        torch.testing.assert_close(mean(torch.cat([x, x]), [piece])[0], row, atol=0, rtol=0)


def test_settings_that_contradict_each_other(tmp_path: Path) -> None:
    encoder(tmp_path, "bert")
    with pytest.raises(ConfigError, match="--convert embed adds to generation"):
        LLM(tmp_path, convert="embed")
    with pytest.raises(ConfigError, match="is an encoder"):
        LLM(tmp_path, runner="generate")
    decoder(tmp_path / "decoder")
    with pytest.raises(ConfigError, match="--pooling is for embeddings"):
        LLM(tmp_path / "decoder", pooling="mean")
    with pytest.raises(RequestError, match="--convert embed"):
        LLM(tmp_path / "decoder").embed("the fox")
