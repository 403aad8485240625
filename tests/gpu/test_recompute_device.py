"""Recomputation and host memory on a device: the gradients of keeping everything there."""

from __future__ import annotations

import pytest
import torch

from twofold.models.decoder import Decoder
from twofold.models.packed import PackedContext
from twofold.models.weights import spec_from
from twofold.train.init import init_weights
from twofold.train.kept import Host
from twofold.train.recompute import recompute_layers

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 128, "hidden_size": 128,
    "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "hidden_act": "silu", "tie_word_embeddings": True,
}  # fmt: skip


def gradients(policy: str, host: bool) -> dict[str, torch.Tensor]:
    decoder = Decoder(spec_from(CONFIG))
    init_weights(decoder, 3)
    decoder.to("cuda")
    recompute_layers(decoder, policy, keeper=Host() if host else None)
    ids = torch.arange(300, device="cuda") % 128
    hidden_TD = decoder(ids, PackedContext((200, 100), "cuda"))
    hidden_TD.square().sum().backward()
    return {name: p.grad for name, p in decoder.layers.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("policy", ["none", "selective", "attention", "ffn", "full"])
@pytest.mark.parametrize("host", [False, True])
def test_the_same_gradients(policy: str, host: bool) -> None:
    expected, found = gradients("none", False), gradients(policy, host)
    assert expected.keys() == found.keys() and len(expected) > 10
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad, rtol=1e-6, atol=1e-6)
