"""The benchmark of embeddings: the same lengths each turn, the same vectors on both sides, its figures."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import embeddings
import pytest
import torch
import transformers
import turns


def test_lengths_are_the_same_each_turn_and_ids_are_not() -> None:
    first, second = embeddings.texts_of(50, 1), embeddings.texts_of(50, 2)
    assert [len(ids) for ids in first] == [len(ids) for ids in second] and first != second
    assert embeddings.texts_of(50, 1) == first
    assert min(map(len, first)) >= 8 and max(map(len, first)) <= 256 and len({len(ids) for ids in first}) > 10


@pytest.mark.parametrize("order", list(embeddings.ORDERS))
def test_both_sides_make_the_same_vectors(order: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = embeddings.CONFIG | {"num_hidden_layers": 1, "vocab_size": 1200, "hidden_size": 48, "intermediate_size": 64}
    monkeypatch.setattr(embeddings, "CONFIG", small)
    monkeypatch.syspath_prepend(str(turns.PEERS))
    model = embeddings.checkpoint(tmp_path)
    texts = embeddings.texts_of(9, 1)
    seconds, ours = embeddings.Ours(model).run(texts)
    peer = transformers.AutoModel.from_pretrained(model).eval()
    theirs = import_module("transformers_embed").run(peer, {"texts": texts, "batch": 4, "order": order})
    assert seconds > 0
    assert (torch.tensor(ours) - torch.tensor(theirs)).abs().max() < embeddings.ALIKE


def test_the_report(capsys: pytest.CaptureFixture[str]) -> None:
    seconds = {"twofold": [1.0, 2.0, 1.0], "arrival": [3.0, 4.0, 2.0]}
    record = embeddings.report(10, seconds, {"arrival": 16}, "a peer", 1e-7)
    assert record["texts_s"] == 10.0 and record["arrival"] == {
        "batch": 16,
        "texts_s": pytest.approx(10 / 3),
        "ratio": 2.0,
        "ratio_least": 2.0,
    }
    assert "2.00 times transformers (2.00 to 3.00)" in capsys.readouterr().out
