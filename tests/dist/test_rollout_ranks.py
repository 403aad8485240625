"""Rollouts of two ranks under ZeRO: gathered weights, one process's tokens, and the trainer's bits."""

from __future__ import annotations

import pytest
import torch
from test_zero import CONFIG
from world import run_ranks

from tests.parity.bare_words import BareWords, prompt
from twofold.align.ledger import Ledger, of_engine, of_trainer
from twofold.align.rollout import rollout
from twofold.align.sync import Shared
from twofold.engine.config import EngineConfig
from twofold.engine.sampling import SamplingParams
from twofold.models.decoder import Decoder
from twofold.models.packed import PackedContext
from twofold.models.weights import spec_from
from twofold.parallel import Layout, Mesh, ParallelConfig
from twofold.parallel.layout import lay_out
from twofold.train.axes import Axes
from twofold.train.config import OptimizerConfig
from twofold.train.init import init_weights
from twofold.train.optimizer import Optimizer
from twofold.train.zero import Zero

SETTINGS = EngineConfig(num_blocks=40, max_num_seqs=8, max_num_batched_tokens=64)
PARAMS = SamplingParams(max_tokens=9, temperature=1.3)
DTYPES = {"fp32": None, "bf16": torch.bfloat16}


def work(rank: int, layout: Layout, precision: str) -> list[dict]:
    """Two rounds of rollouts with an update between them; each round's tokens, bytes and the trainer's bits."""
    mesh, words = Mesh(layout, rank), BareWords(97)
    decoder = Decoder(spec_from(CONFIG))
    init_weights(decoder, 5)
    whole = sum(weight.numel() for weight in decoder.parameters())
    zero = Zero(decoder, mesh, DTYPES[precision])
    optimizer = Optimizer(decoder.named_parameters(), OptimizerConfig(lr=1e-2), norm=Axes(mesh).norm)
    shared, ledger, told = Shared(zero, SETTINGS, eos_ids=(7,)), Ledger(), []
    of_trainer(ledger, zero, optimizer)
    of_engine(ledger, lambda: shared.engine)
    for version in range(2):
        with shared.awake(version) as engine:
            mine = [prompt(i, 20 + i, 97) for i in range(mesh.rank("data"), 4, mesh.size("data"))]
            groups = list(rollout(engine, mine, 2, PARAMS, seed=3, words=words))
            ledger.read("rollout")
        assert engine.asleep
        made = [each for group in groups for each in group.rollouts]
        lengths = [len(each.prompt.ids) + len(each.ids) for each in made]
        ids_T = torch.tensor([token for each in made for token in (*each.prompt.ids, *each.ids)])
        zero.micro_batch(last=True)
        hidden_TD = decoder(ids_T, PackedContext(lengths, kv_dtype=DTYPES[precision]))
        found_T = decoder.logprobs(hidden_TD, ids_T.roll(-1), temperature=1.3)
        rows = found_T.detach().split(lengths)
        same = [
            row[len(each.prompt.ids) - 1 : -1].tolist() == [*each.logprobs]
            for each, row in zip(made, rows, strict=True)
        ]
        (-found_T.sum() / 200).backward()
        ledger.read("update")
        optimizer.clip()
        optimizer.step(1e-2)
        optimizer.zero()
        told.append(
            {
                "tokens": {(each.prompt.number, each.sample): (each.ids, each.logprobs) for each in made},
                "same": all(same),
                "moved": shared.last.moved,
                "whole": whole,
                "ledger": ledger.record(),
                "versions": {v for each in made for v in each.versions},
            }
        )
    return told


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_two_ranks_roll_out_what_one_process_does(stage: int, precision: str) -> None:
    layout = lay_out(ParallelConfig(zero=stage), 2)
    answers = run_ranks(2, work, layout, precision)
    divided = stage > 0 or precision == "bf16"
    for version in range(2):
        rounds = [answer[version] for answer in answers]
        assert all(one["same"] for one in rounds), "the rollout's likelihoods are the trainer's, by bits"
        assert all(one["versions"] == {version} for one in rounds)
        assert set(rounds[0]["tokens"]).isdisjoint(rounds[1]["tokens"]) and len(rounds[0]["tokens"]) == 4
    if precision == "fp32":
        (alone,) = run_ranks(1, work, lay_out(ParallelConfig(), 1), precision)
        assert answers[0][0]["tokens"] | answers[1][0]["tokens"] == alone[0]["tokens"]
        assert alone[0]["moved"] == 0
    width = 4 if precision == "fp32" else 2
    for rounds in zip(*answers, strict=True):
        moved = sum(one["moved"] for one in rounds)
        assert moved == (rounds[0]["whole"] * width if stage else 0), "each rank is sent what it has not"
        for one in rounds:
            kept, busy = one["ledger"]["rollout"], one["ledger"]["update"]
            assert kept["KV cache"] > 0 == busy["KV cache"] and busy["program"] == 0
            assert (kept["gathered"] >= one["whole"] * width) is divided, "stage 0 in bf16 gathers its own copy"
            if stage == 3:
                assert busy["weights"] < 0.6 * one["whole"] * 4
