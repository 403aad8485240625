"""init_inference: the same outputs as transformers' own, family by family, and a report of what became of what."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from tests.parity.inject_models import FAMILIES, make, texts
from twofold import init_inference
from twofold.core import ConfigError
from twofold.models.inject.gated import GatedFeedForward
from twofold.models.inject.joined import Product
from twofold.models.inject.reading import Piece, read

QUIET = {"do_sample": False, "max_new_tokens": 12, "pad_token_id": 0}
JOINED = {"llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3", "olmo2", "cohere", "mixtral", "gpt_oss", "opt"}
GATED = {"llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3", "olmo2", "cohere"}
TURNED = set(FAMILIES) - {"gpt2", "opt", "bert"}


@torch.no_grad()
def logits(model: Any, padding: str = "left") -> torch.Tensor:
    ids, mask = texts(padding)
    found: torch.Tensor = model(ids, attention_mask=mask)[0]
    return found[mask.bool()]


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_a_family_says_the_same(name: str) -> None:
    model = make(name)
    before = logits(model), logits(model, "right")
    ids, mask = texts()
    said = None if name == "bert" else model.generate(ids, attention_mask=mask, **QUIET)  # type: ignore[operator]
    engine = init_inference(model)
    assert engine.module is model and engine.report.difference is not None and engine.report.difference < 2e-6
    for padding, expected in zip(("left", "right"), before, strict=True):
        torch.testing.assert_close(logits(engine, padding), expected, atol=2e-5, rtol=2e-5)
    if said is not None:
        assert torch.equal(engine.generate(ids, attention_mask=mask, **QUIET), said)
        assert not engine.other_attention, "every call of attention was ours"
    told = str(engine.report)
    assert ("one product for queries, keys and values" in told) == (name in JOINED)
    assert ("one product for gate and up" in told) == (name in GATED)
    assert ("our attention and turn" in told) == (name in TURNED)
    assert all(fate.why for fate in engine.report.left) and "Embedding" in told
    assert not any(type(module) is nn.Linear for module in model.modules())


def test_what_is_left_says_why() -> None:
    report = init_inference(make("mixtral")).report
    why = {fate.kind: fate.why for fate in report.left}
    assert "no kernel of ours" in why["MixtralExperts"] and "table" in why["Embedding"]
    assert {fate.name for fate in report.replaced if fate.kind == "Linear"} >= {
        "model.layers.0.self_attn.q_proj",
        "model.layers.1.self_attn.o_proj",
        "lm_head",
    }


def test_a_module_that_computes_something_else_is_found_out() -> None:
    class LoudRMSNorm(nn.Module):
        def __init__(self, size: int) -> None:
            super().__init__()
            self.weight, self.eps = nn.Parameter(torch.ones(size)), 1e-6

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2.0 * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight

    class OddMLP(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate_proj, self.up_proj, self.down_proj = nn.Linear(64, 32), nn.Linear(64, 32), nn.Linear(32, 64)
            self.act_fn = nn.SiLU()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.down_proj(self.act_fn(self.gate_proj(x)) + self.up_proj(x))
            return out

    model: Any = make("llama")
    model.model.norm = LoudRMSNorm(64)
    model.model.layers[1].mlp = OddMLP()
    before = logits(model)
    engine = init_inference(model)
    fates = {fate.name: fate for fate in engine.report.fates}
    assert "something else" in fates["model.norm"].why and fates["model.norm"].by is None
    assert fates["model.layers.1.mlp.gate_proj"].by == "our product", "what is inside is replaced one by one"
    assert not isinstance(model.model.layers[1].mlp, GatedFeedForward)
    torch.testing.assert_close(logits(engine), before, atol=2e-5, rtol=2e-5)


def test_another_model_of_the_same_file_is_as_it_was() -> None:
    one, other = make("llama"), make("llama")
    init_inference(one)
    assert type(other).__module__ == type(one).__module__
    assert not any(isinstance(module, Product) for module in other.modules())
    assert "forward" not in vars(other.model.layers[0].self_attn)  # type: ignore[union-attr,index]


def test_weights_keep_their_names_and_can_be_replaced_and_moved() -> None:
    model, fresh = make("qwen2"), make("qwen2")
    names = set(model.state_dict())
    engine = init_inference(model)
    assert set(model.state_dict()) == names
    with torch.no_grad():
        for parameter in fresh.parameters():
            parameter.mul_(1.25)
    model.load_state_dict(fresh.state_dict())
    torch.testing.assert_close(logits(engine), logits(fresh), atol=3e-5, rtol=3e-5)
    model.double().float()
    torch.testing.assert_close(logits(engine), logits(fresh), atol=3e-5, rtol=3e-5)
    tied: Any = init_inference(make("llama", tie_word_embeddings=True))
    assert tied.lm_head.weight is tied.model.embed_tokens.weight


@pytest.mark.parametrize(("dtype", "bound"), [("bfloat16", 3e-2), (torch.float16, 4e-3), ("int8", 2e-2)])
def test_other_dtypes(dtype: Any, bound: float) -> None:
    model = make("llama")
    cast = {"bfloat16": torch.bfloat16, torch.float16: torch.float16}.get(dtype, torch.float32)
    before = logits(copy.deepcopy(model).to(cast)).float()
    engine = init_inference(model, dtype=dtype)
    after = logits(engine).float()
    assert float((after - before).abs().max() / before.abs().max()) < bound
    if dtype == "int8":
        held = sum(p.untyped_storage().nbytes() for p in {id(p): p for p in model.model.layers.parameters()}.values())  # type: ignore[union-attr]
        assert held < 4000, "float weights of products are not kept beside their codes"
        assert not torch.equal(after, before)


def test_static_caches_batches_and_chunks_are_read() -> None:
    model = make("mistral")
    ids, _ = texts()
    said = model.generate(ids, cache_implementation="static", **QUIET)  # type: ignore[operator]
    engine = init_inference(model)
    assert torch.equal(engine.generate(ids, cache_implementation="static", **QUIET), said)
    assert not engine.other_attention
    with torch.no_grad():
        whole = engine(ids[1:]).logits
        first = engine(ids[1:, :17], use_cache=True)
        rest = engine(ids[1:, 17:], past_key_values=first.past_key_values).logits
    torch.testing.assert_close(torch.cat([first.logits, rest], 1), whole, atol=2e-5, rtol=2e-5)


def test_a_mask_that_is_no_past_goes_to_the_models_own_attention() -> None:
    model = make("llama")
    ids, _ = texts()
    prefix = torch.tril(torch.ones(40, 40, dtype=torch.bool))
    prefix[:, :10] = True  # ten tokens that see each other
    mask = prefix.expand(2, 1, 40, 40)
    with torch.no_grad():
        before = model(ids, attention_mask=mask).logits
        engine = init_inference(model)
        after = engine(ids, attention_mask=mask).logits
    torch.testing.assert_close(after, before, atol=2e-5, rtol=2e-5)
    assert engine.other_attention == {"the mask is not that of texts which look back": 2}


def test_masks_are_read_as_pieces() -> None:
    causal = torch.tril(torch.ones(4, 6, dtype=torch.bool), diagonal=2)[None, None]
    assert read(causal, 1, 4, 6, None) == [Piece(0, 4, 0, 6)]
    assert read(None, 2, 3, 3, None) == [Piece(0, 3, 0, 3)] * 2 and read(None, 1, 2, 5, None) is None
    padded = torch.tril(torch.ones(5, 5, dtype=torch.bool))[None, None].clone()
    padded[..., :2] = False
    assert read(padded, 1, 5, 5, None) == [Piece(2, 3, 2, 5)]
    added = torch.where(padded, 0.0, torch.finfo(torch.float32).min)
    assert read(added, 1, 5, 5, None) == [Piece(2, 3, 2, 5)]
    banded = padded & torch.triu(torch.ones(5, 5, dtype=torch.bool), diagonal=-1)
    assert read(banded, 1, 5, 5, 2) == [Piece(2, 3, 2, 5)] and read(banded, 1, 5, 5, None) is None
    holed = causal.clone()
    holed[..., 2, 1] = False
    assert read(holed, 1, 4, 6, None) is None


def test_settings_under_deepspeeds_names(tmp_path: Any) -> None:
    config = tmp_path / "inference.json"
    config.write_text('{"dtype": "fp32", "tensor_parallel": {"tp_size": 1}, "replace_with_kernel_inject": true}')
    assert init_inference(make("llama"), config, max_out_tokens=64).config.dtype == "float32"
    plain = init_inference(make("llama"), kernel_inject=False)
    assert not plain.report.fates and any(type(m) is nn.Linear for m in plain.module.modules())
    for wrong, said in (
        ({"dtpye": "fp32"}, "did you mean 'dtype'"),
        ({"dtype": "int3"}, "int3"),
        ({"tensor_parallel": 2}, "torchrun"),
        ({"tensor_parallel": {"size": 2}}, "tp_size"),
    ):
        with pytest.raises(ConfigError, match=said):
            init_inference(make("llama"), **wrong)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="torch module"):
        init_inference("a path")  # type: ignore[arg-type]


def test_transformers_is_not_needed_to_import_it() -> None:
    import subprocess
    import sys

    code = "import twofold, sys; twofold.init_inference; assert 'transformers' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    assert transformers.__version__
