"""Training against plain loops: transformers, autograd through a naive forward, other splits, recomputation."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from small_trainer import VOCAB, Numbers, make_trainer
from tiny import SPECS, decoder
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from twofold.core import TwofoldError
from twofold.data import Batch
from twofold.kernels import all_ops
from twofold.kernels.attention import Attend
from twofold.models import weights
from twofold.models.decoder import Decoder
from twofold.models.packed import PackedContext
from twofold.train import loss as losses
from twofold.train.config import SampleConfig
from twofold.train.init import init_weights
from twofold.train.objective import Tokens
from twofold.train.recompute import recompute_layers
from twofold.train.schedule import lr_at
from twofold.train.share import cut
from twofold.train.trainer import Data


def llama(tmp_path: Path) -> LlamaForCausalLM:
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=40,
        intermediate_size=72,
        num_hidden_layers=2,
        num_attention_heads=5,
        num_key_value_heads=1,
        max_position_embeddings=256,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config).float()
    model.save_pretrained(tmp_path)
    return model.train()


def test_the_loss_curve_is_that_of_a_plain_loop_with_transformers(tmp_path: Path) -> None:
    theirs = llama(tmp_path)
    ours = make_trainer(weights.load(tmp_path), tmp_path, Numbers((24, 24, 24, 24), hide=0.3), micro=48)
    decay = [p for p in theirs.parameters() if p.ndim >= 2]
    keep = [p for p in theirs.parameters() if p.ndim < 2]
    adam = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.1}, {"params": keep, "weight_decay": 0.0}], lr=1.0, betas=(0.9, 0.95)
    )
    for step in range(6):
        batch = ours.data.train.batch(step)
        logits = theirs(batch.ids_T.view(4, 24)).logits.flatten(0, 1)
        truth = F.cross_entropy(logits, batch.targets_T)
        adam.zero_grad()
        truth.backward()
        norm = nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
        for group in adam.param_groups:
            group["lr"] = lr_at(step, 3e-3, ours.recipe.schedule)
        adam.step()
        done = ours.step(batch)
        ours.position = replace(ours.position, step=step + 1)
        assert done.loss == pytest.approx(truth.item(), abs=1e-4), step
        assert done.grad_norm == pytest.approx(float(norm), rel=1e-3)
    named = dict(weights.decoder_tensors(ours.decoder))
    for name, weight in theirs.named_parameters():
        torch.testing.assert_close(named[name], weight, atol=2e-4, rtol=0)


class Dense:
    """Attention written out: every score of a sequence at once, masked, softmaxed; autograd does the rest."""

    def __init__(self, lengths: tuple[int, ...]) -> None:
        self.lengths = lengths
        self.positions_T = torch.cat([torch.arange(n) for n in lengths])

    def attend(self, layer: int, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, how: Attend) -> Tensor:
        out = []
        for q, k, v in zip(*(x.split(self.lengths) for x in (q_THD, k_TKD, v_TKD))):
            share = q.shape[1] // k.shape[1]
            k, v = (x.repeat_interleave(share, 1) for x in (k, v))
            s_HLN = torch.einsum("lhd,nhd->hln", q, k) * how.scale
            if how.softcap is not None:
                s_HLN = how.softcap * torch.tanh(s_HLN / how.softcap)
            gap = torch.arange(len(q))[None, :] - torch.arange(len(q))[:, None]
            if how.slopes is not None:
                s_HLN = s_HLN + torch.tensor(how.slopes)[:, None, None] * gap
            hidden = gap > 0
            if how.window is not None:
                hidden |= gap <= -how.window
            if how.sparse is not None:
                place = torch.arange(len(q))
                hidden = hidden | how.sparse.table().absent(place[None], place, q.shape[1])[0, :, :, 0]
            out.append(torch.einsum("hln,nhd->lhd", s_HLN.masked_fill(hidden, -torch.inf).softmax(-1), v))
        return torch.cat(out)


@pytest.fixture
def plain_ops():
    def choose(name: str | None) -> None:
        for op in all_ops():
            op.use(name)

    yield choose
    choose(None)


@pytest.mark.parametrize("name", sorted(SPECS))
def test_gradients_are_those_of_autograd_through_the_references(name: str, plain_ops) -> None:
    model = decoder(SPECS[name])
    batch = Numbers((150, 7, 1, 131, 260), hide=0.2, vocab=model.spec.vocab).batch(0)
    total = int((batch.targets_T != losses.IGNORE).sum())
    hidden_TD = model(batch.ids_T, PackedContext(batch.lengths))
    summed = losses.backward(model, hidden_TD, batch.targets_T, total, model.spec.vocab)
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    plain_ops("reference")
    logits_TV = model.logits(model(batch.ids_T, Dense(batch.lengths)))
    truth = F.cross_entropy(logits_TV, batch.targets_T, reduction="sum")
    (truth / total).backward()
    assert summed == pytest.approx(float(truth.detach()), rel=1e-5)
    for name, weight in model.named_parameters():
        scale = float(weight.grad.abs().max()) + 1e-8
        gap = float((found[name] - weight.grad).abs().max()) / scale
        assert gap < 1e-3, f"{name}: {gap}"


def one_step(folder: Path, micro: int | None, *, recompute: bool = False, dtype: torch.dtype = torch.float32):
    model = Decoder(SPECS["llama"], dtype=dtype)
    init_weights(model, 7)
    if recompute:
        recompute_layers(model)
    trainer = make_trainer(model, folder, Numbers((30, 2, 90, 61, 1, 44), hide=0.4, vocab=131), micro=micro)
    done = trainer.step(trainer.data.train.batch(0))
    return done, {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("micro", [1, 61, 100, 130])
def test_the_split_into_micro_batches_changes_neither_loss_nor_step(tmp_path: Path, micro: int) -> None:
    whole, weights_whole = one_step(tmp_path / "a", None)
    parts, weights_parts = one_step(tmp_path / "b", micro)
    assert parts.targets == whole.targets
    assert parts.loss == pytest.approx(whole.loss, rel=1e-6)
    assert parts.grad_norm == pytest.approx(whole.grad_norm, rel=1e-5)
    for name, weight in weights_whole.items():  # a first AdamW step moves each number by lr times about its sign
        close = (weights_parts[name] - weight).abs() < 1e-5
        assert close.float().mean() > 0.99, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_recomputing_layers_changes_no_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    kept, weights_kept = one_step(tmp_path / "a", 100, dtype=dtype)
    again, weights_again = one_step(tmp_path / "b", 100, dtype=dtype, recompute=True)
    assert kept == again
    for name, weight in weights_kept.items():
        assert torch.equal(weight, weights_again[name]), name


def test_chunks_of_rows_change_no_loss(monkeypatch) -> None:
    model = decoder(SPECS["llama"])
    batch = Numbers((100, 60), hide=0.3, vocab=131).batch(0)
    results = []
    for rows in (1 << 20, 16):
        monkeypatch.setattr(losses, "CHUNK_NUMBERS", rows * 131)
        monkeypatch.setattr(losses, "CHUNK_ROWS", 1)
        model.zero_grad()
        hidden_TD = model(batch.ids_T, PackedContext(batch.lengths))
        summed = losses.backward(model, hidden_TD, batch.targets_T, 10, 131)
        results.append((summed, model.embed.weight.grad.clone()))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-6)
    torch.testing.assert_close(results[0][1], results[1][1], atol=1e-5, rtol=1e-4)


def test_splitting_keeps_sequences_whole_and_in_order() -> None:
    batch = Numbers((30, 2, 90, 61, 1, 44)).batch(0)
    parts = cut(batch, 92)
    assert [part.lengths for part in parts] == [(30, 2), (90,), (61, 1), (44,)]
    assert torch.equal(torch.cat([part.ids_T for part in parts]), batch.ids_T)
    assert torch.equal(torch.cat([part.targets_T for part in parts]), batch.targets_T)
    assert cut(batch, None) == [batch]


def test_the_trainers_forward_log_probabilities_are_the_evaluators(tmp_path: Path) -> None:
    model = decoder(SPECS["llama"])
    trainer = make_trainer(model, tmp_path, Numbers((50, 50), vocab=131))
    batch = trainer.data.train.batch(3)
    trainer.data = Data(train=trainer.data.train, valid=[batch])
    before = trainer.evaluate()
    assert trainer.step(batch).loss == pytest.approx(before, rel=1e-6)
    assert trainer.evaluate() < before
    trainer.data = Data(train=trainer.data.train, valid=[])
    assert math.isnan(trainer.evaluate())


def test_a_step_that_is_not_finite_is_skipped_counted_and_in_a_row_fatal(tmp_path: Path) -> None:
    model = decoder(SPECS["llama"])
    trainer = make_trainer(model, tmp_path, Numbers((40,), vocab=131))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    good, calls = trainer.step, 0

    def bad(batch: Batch):
        nonlocal calls
        calls += 1
        poison = math.nan if calls in (2, 4, 5, 6) else 1.0
        return good(batch, Tokens(lambda *given: losses.next_token(*given) * poison))

    trainer.step = bad  # type: ignore[method-assign]
    with pytest.raises(
        TwofoldError, match=r"3 steps in a row were skipped, the last \(step 6\).*loss is not finite.*lr"
    ):
        trainer.fit()
    skipped = [row["step"] for row in trainer.journal.rows if "skipped" in row]
    assert skipped == [2, 4, 5, 6] and trainer.position.skipped == 4
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert any(not torch.equal(before[name], p) for name, p in model.named_parameters())


@settings(max_examples=15)
@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=12),
    st.lists(st.booleans(), min_size=12, max_size=12),
    st.floats(0.0, 0.9),
)
def test_any_split_into_micro_batches_gives_the_same_gradient(
    lengths: list[int], cuts: list[bool], hide: float
) -> None:
    """To 1e-6 of its norm, whatever the sequences, the places of the cuts and the share of tokens without a target."""
    model = decoder(SPECS["llama"])
    batch = Numbers(tuple(lengths), hide=hide, vocab=131).batch(len(lengths))
    total = max(1, int((batch.targets_T != losses.IGNORE).sum()))

    def gradient(parts: list[Batch]) -> tuple[Tensor, float]:
        model.zero_grad()
        summed = 0.0
        for part in parts:
            hidden_TD = model(part.ids_T, PackedContext(part.lengths))
            summed += losses.backward(model, hidden_TD, part.targets_T, total, 131)
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
        return torch.cat([grad.flatten().double() for grad in grads]), summed

    whole, loss = gradient([batch])
    parts, summed = gradient(at_places(batch, cuts))
    assert float((parts - whole).norm()) <= 1e-6 * float(whole.norm())
    assert summed == pytest.approx(loss, rel=1e-6)


def at_places(batch: Batch, cuts: list[bool]) -> list[Batch]:
    """Micro-batches that end after each sequence whose cut is true."""
    ends = [n + 1 for n, end in zip(range(len(batch.lengths)), cuts) if end or n + 1 == len(batch.lengths)]
    parts, first, start = [], 0, 0
    for end in ends:
        lengths = batch.lengths[first:end]
        piece = slice(start, start + sum(lengths))
        parts.append(Batch(ids_T=batch.ids_T[piece], targets_T=batch.targets_T[piece], lengths=lengths))
        first, start = end, piece.stop
    return parts


def test_a_batch_without_targets_changes_nothing(tmp_path: Path) -> None:
    model = decoder(SPECS["llama"])
    trainer = make_trainer(model, tmp_path, Numbers((40,), hide=1.1, vocab=131))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    assert trainer.step(trainer.data.train.batch(0)).skipped == "the batch has no target"
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())


def test_samples_are_asked_of_the_engine_with_the_weights_in_training(tmp_path: Path) -> None:
    model = decoder(SPECS["llama"])
    asked = []

    def sampler(on, prompts, settings, eos_ids):
        assert on is model and not torch.is_grad_enabled()
        asked.append((prompts, settings.max_tokens, eos_ids))
        return [[5, 6] for _ in prompts]

    trainer = make_trainer(model, tmp_path, Numbers((40,), vocab=131), steps=6, sampler=sampler)
    sample = SampleConfig(prompts=("hello", "a"), every=4, max_tokens=9)
    trainer.recipe = replace(trainer.recipe, sample=sample)
    assert trainer.fit() == 0
    assert asked == [([[5, 2, 3], [1, 2, 3]], 9, (1,))] * 2
    said = [(row["step"], row["prompt"], row["text"]) for row in trainer.journal.rows if "text" in row]
    assert said == [(4, "hello", "5 6"), (4, "a", "5 6"), (6, "hello", "5 6"), (6, "a", "5 6")]


def test_fresh_weights_are_a_function_of_the_seed_and_start_near_a_uniform_guess() -> None:
    def fresh(seed: int) -> Decoder:
        model = Decoder(SPECS["llama"])
        init_weights(model, seed)
        return model

    one, same, other = fresh(1), fresh(1), fresh(2)
    for (name, a), b, c in zip(one.named_parameters(), same.parameters(), other.parameters()):
        assert torch.equal(a, b)
        assert name.endswith(("norm.weight", "norm1.weight", "norm2.weight")) or not torch.equal(a, c)
    assert one.layers[0].down.weight.detach().std() < 0.7 * one.layers[0].gate_up.weight.detach().std()
    batch = Numbers((200,), vocab=131).batch(0)
    loss, rows = losses.evaluate(one, one(batch.ids_T, PackedContext((200,))), batch.targets_T, 131)
    assert loss / rows == pytest.approx(math.log(131), rel=0.02)
