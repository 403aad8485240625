"""init_inference with tensor_parallel: two ranks say what one says, each with half of attention and feed-forward."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.dist.world import run_ranks
from tests.parity.inject_models import make, texts

QUIET = {"do_sample": False, "max_new_tokens": 8, "pad_token_id": 0}


def share(rank: int, name: str, dtype: str) -> tuple[torch.Tensor, torch.Tensor, int]:
    from twofold import init_inference

    ids, mask = texts()
    engine = init_inference(make(name), tensor_parallel={"tp_size": 2}, dtype=dtype)
    with torch.no_grad():
        logits = engine(ids, attention_mask=mask).logits[mask.bool()]
    said = engine.generate(ids, attention_mask=mask, **QUIET)
    return logits, said, sum(p.numel() for p in engine.model.layers[0].parameters())


@pytest.mark.parametrize(
    ("name", "dtype"), [("llama", "auto"), ("qwen2", "auto"), ("gemma3", "auto"), ("llama", "int8")]
)
def test_two_ranks_say_what_one_says(name: str, dtype: str) -> None:
    from twofold import init_inference

    ids, mask = texts()
    whole: Any = init_inference(make(name), dtype=dtype)
    parts = run_ranks(2, share, name, dtype)
    with torch.no_grad():
        expected = whole(ids, attention_mask=mask).logits[mask.bool()]
    said = whole.generate(ids, attention_mask=mask, **QUIET)
    full = sum(p.numel() for p in make(name).model.layers[0].parameters())  # type: ignore[union-attr,index]
    for logits, text, held in parts:
        bound = 5e-2 if dtype == "int8" else 5e-5
        torch.testing.assert_close(logits, expected, atol=bound, rtol=bound)
        assert dtype == "int8" or torch.equal(text, said)
        assert dtype == "int8" or held < 0.55 * full


def uneven(rank: int, ranks: int, name: str) -> str:
    from twofold import init_inference
    from twofold.core import ConfigError

    try:
        init_inference(make(name), tensor_parallel=ranks)
    except ConfigError as error:
        return str(error)
    return ""


def test_what_cannot_be_shared_is_refused_by_name() -> None:
    assert all("normalises all queries" in said for said in run_ranks(2, uneven, 2, "olmo2"))
    assert all("2 heads cannot be shared by 4" in said for said in run_ranks(4, uneven, 4, "llama"))


def strange(rank: int) -> str:
    from twofold import init_inference
    from twofold.core import ConfigError

    model = make("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.add_(rank)  # type: ignore[union-attr,index,operator]
    try:
        init_inference(model, tensor_parallel=2)
    except ConfigError as error:
        return str(error)
    return ""


def test_ranks_with_different_weights_are_told() -> None:
    assert any("layers.1.mlp.up_proj.weight" in said for said in run_ranks(2, strange))
