"""A model of transformers through DeepSpeed's door: it recomputes, and transformers reads what was saved."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

import twofold

CONFIG = {
    "train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-2}},
}


def tiny(kind: str) -> PreTrainedModel:
    torch.manual_seed(0)
    if kind == "gpt2":
        return GPT2LMHeadModel(
            GPT2Config(
                vocab_size=37, n_positions=16, n_embd=16, n_layer=2, n_head=2, embd_pdrop=0, attn_pdrop=0,
                resid_pdrop=0, bos_token_id=0, eos_token_id=0,
            )
        )  # fmt: skip
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=37, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, max_position_embeddings=16,
        )
    )  # fmt: skip


def train(model: PreTrainedModel) -> tuple[twofold.train.deepspeed.Engine, list[float]]:
    engine, *_ = twofold.initialize(model=model, config=CONFIG)
    engine.train()
    told = []
    for step in range(4):
        ids = torch.randint(37, (2, 8), generator=torch.Generator().manual_seed(step))
        told.append(float(engine.backward(engine(input_ids=ids, labels=ids).loss).detach()))
        engine.step()
    return engine, told


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_model_of_transformers(kind: str, tmp_path: Path) -> None:
    engine, told = train(tiny(kind))
    again = tiny(kind)
    again.gradient_checkpointing_enable()
    assert train(again)[1] == told

    engine.module.config.save_pretrained(tmp_path / "model")
    engine.save_16bit_model(tmp_path / "model")
    loaded = type(engine.module).from_pretrained(tmp_path / "model")
    ids = torch.arange(8)[None]
    with torch.no_grad():
        assert torch.equal(loaded.eval()(ids).logits, engine.eval()(ids).logits)
