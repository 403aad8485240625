"""init_inference with tensor_parallel: two ranks say what one says, each with half of attention and feed-forward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.dist.world import run_ranks
from tests.parity.inject_models import make, texts

QUIET = {"do_sample": False, "max_new_tokens": 8, "pad_token_id": 0}
SHARED = [("llama", "auto"), ("qwen2", "auto"), ("gemma3", "auto"), ("llama", "int8")]
Shares = dict[Any, Any]


def share(name: str, dtype: str) -> tuple[torch.Tensor, torch.Tensor, int]:
    from twofold import init_inference

    ids, mask = texts()
    engine = init_inference(make(name), tensor_parallel={"tp_size": 2}, dtype=dtype)
    with torch.no_grad():
        logits = engine(ids, attention_mask=mask).logits[mask.bool()]
    said = engine.generate(ids, attention_mask=mask, **QUIET)
    return logits, said, sum(p.numel() for p in engine.model.layers[0].parameters())


def refusal(make_model: Callable[[], torch.nn.Module]) -> str:
    from twofold import init_inference
    from twofold.core import ConfigError

    try:
        init_inference(make_model(), tensor_parallel=2)
    except ConfigError as error:
        return str(error)
    return ""


def strange(rank: int) -> torch.nn.Module:
    """A model that is not the same on every rank."""
    model = make("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.add_(rank)  # type: ignore[union-attr,index,operator]
    return model


def work(rank: int) -> Shares:
    """All that the tests ask of a rank: to start one takes longer than any of it."""
    found: Shares = {case: share(*case) for case in SHARED}
    found["normed"] = refusal(lambda: make("olmo2"))
    found["uneven"] = refusal(lambda: make("llama", num_key_value_heads=1))
    found["strange"] = refusal(lambda: strange(rank))
    return found


@pytest.fixture(scope="module")
def ranks() -> list[Shares]:
    return run_ranks(2, work)


@pytest.mark.parametrize(("name", "dtype"), SHARED)
def test_two_ranks_say_what_one_says(ranks: list[Shares], name: str, dtype: str) -> None:
    from twofold import init_inference

    ids, mask = texts()
    whole: Any = init_inference(make(name), dtype=dtype)
    with torch.no_grad():
        expected = whole(ids, attention_mask=mask).logits[mask.bool()]
    said = whole.generate(ids, attention_mask=mask, **QUIET)
    full = sum(p.numel() for p in make(name).model.layers[0].parameters())  # type: ignore[union-attr,index]
    for logits, text, held in (found[name, dtype] for found in ranks):
        bound = 5e-2 if dtype == "int8" else 5e-5
        torch.testing.assert_close(logits, expected, atol=bound, rtol=bound)
        assert dtype == "int8" or torch.equal(text, said)
        assert dtype == "int8" or held < 0.55 * full


def test_what_cannot_be_shared_is_refused_by_name(ranks: list[Shares]) -> None:
    assert all("normalises all queries" in found["normed"] for found in ranks)
    assert all("1 heads cannot be shared by 2" in found["uneven"] for found in ranks)


def test_ranks_with_different_weights_are_told(ranks: list[Shares]) -> None:
    assert any("layers.1.mlp.up_proj.weight" in found["strange"] for found in ranks)
