"""DeepSpeed's door on two ranks: every stage is the plain loop of one process; checkpoints cross numbers of ranks."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from world import run_ranks

import twofold
from twofold.core import ConfigError

VOCAB, MICRO, STEPS, GAS = 37, 2, 4, 3
EPS = 1e-5  # below it AdamW makes a step of a rounding error


class Net(nn.Module):
    """Written by hand: a list of blocks between an embedding and a head, odd sizes, a bias, a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, 9)
        self.blocks = nn.ModuleList(nn.Sequential(nn.LayerNorm(9), nn.Linear(9, 9), nn.Tanh()) for _ in range(3))
        self.head = nn.Linear(9, VOCAB)
        self.register_buffer("shift", torch.linspace(-1, 1, 9))

    def forward(self, input_ids: Tensor, labels: Tensor) -> Any:
        x = self.embed(input_ids) + self.shift.to(self.embed.weight.dtype)
        for block in self.blocks:
            x = x + block(x)
        return (nn.functional.cross_entropy(self.head(x).float().flatten(0, 1), labels.flatten()),)


def make(kind: str, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    if kind == "net":
        return Net()
    if kind == "gpt2":
        config = GPT2Config(
            vocab_size=VOCAB, n_positions=16, n_embd=16, n_layer=2, n_head=2, embd_pdrop=0, attn_pdrop=0, resid_pdrop=0,
            bos_token_id=0, eos_token_id=0,
        )  # fmt: skip
        return GPT2LMHeadModel(config)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, max_position_embeddings=16,
        )
    )  # fmt: skip


def data(step: int, micro: int) -> Tensor:
    """A micro-batch of all ranks: rows 0 to MICRO are rank 0's."""
    return torch.randint(VOCAB, (2 * MICRO, 8), generator=torch.Generator().manual_seed(100 * step + micro))


def settings(stage: int, **more: Any) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": MICRO,
        "gradient_accumulation_steps": GAS,
        "gradient_clipping": 0.5,
        "zero_optimization": {"stage": stage},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "weight_decay": 0.1, "eps": EPS}},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 3, "warmup_min_lr": 1e-3}},
        **more,
    }


def run(engine: twofold.train.deepspeed.Engine, rank: int, world: int, first: int, last: int) -> list[float]:
    """Some steps; the mean loss of each over this rank's micro-batches, and its gradient norm."""
    told = []
    for step in range(first, last):
        summed = 0.0
        for micro in range(GAS):
            ids = data(step, micro)
            mine = ids[rank * MICRO : (rank + 1) * MICRO] if world == 2 else ids
            loss = engine(input_ids=mine, labels=mine)[0]
            summed += float(engine.backward(loss).detach())
            assert engine.is_gradient_accumulation_boundary() == (micro == GAS - 1)
            with torch.no_grad():
                engine(input_ids=mine, labels=mine)  # what this gathers must not be what the next step reads
            engine.step()
        told += [summed, engine.get_global_grad_norm()]
    return told


def whole(engine: twofold.train.deepspeed.Engine) -> dict[str, Tensor]:
    from twofold.train.deepspeed.checkpoint import _whole

    engine.zero.settle()
    return {name: _whole(p).clone() for name, p in engine.module.named_parameters()}


def train(rank: int, kind: str, config: dict[str, Any], seeds: bool = True) -> tuple[list[float], dict[str, Tensor]]:
    """A rank of two; its module begins as no other's, and rank 0's is taken."""
    engine, *_ = twofold.initialize(model=make(kind, seed=rank if seeds else 0), config=config)
    engine.train()
    told = run(engine, rank, 2, 0, STEPS)
    return told, whole(engine)


def plain(kind: str, make_optimizer: Any = None) -> tuple[list[float], dict[str, Tensor]]:
    """The loop of one process in torch alone."""
    model = make(kind)
    optimizer = (make_optimizer or (lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1, eps=EPS)))(
        model.parameters()
    )
    told: list[float] = []
    for step in range(STEPS):
        rate = [1e-3, 1e-3, 1e-3 + 9e-3 * 0.6309297535714574, 1e-2][step]  # log(2) / log(3)
        for group in optimizer.param_groups:
            group["lr"] = rate
        summed = 0.0
        for micro in range(GAS):
            ids = data(step, micro)
            loss = model(input_ids=ids, labels=ids)[0] / GAS
            loss.backward()
            summed += float(loss.detach())
        norm = float(nn.utils.clip_grad_norm_(model.parameters(), 0.5))
        optimizer.step()
        optimizer.zero_grad()
        told += [summed, norm]
    return told, {name: p.detach() for name, p in model.named_parameters()}


def same(found: list[tuple[list[float], dict[str, Tensor]]], wanted: tuple[list[float], dict[str, Tensor]]) -> None:
    told, weights = wanted
    losses = [sum(rank[0][at] for rank in found) / len(found) for at in range(0, len(told), 2)]
    assert losses == pytest.approx(told[::2], abs=1e-5)
    assert found[0][0][1::2] == pytest.approx(told[1::2], rel=1e-5, abs=1e-5)
    for _, ours in found:
        assert ours.keys() == weights.keys()
        for name, weight in weights.items():
            torch.testing.assert_close(
                ours[name], weight, atol=1e-5, rtol=1e-5, msg=lambda text, n=name: f"{n}: {text}"
            )


# --------------------------------------------------------------------------------------------- one group, many modules
def client(rank: int, stage: int, how: str) -> tuple[list[float], dict[str, Tensor]]:
    """An optimizer of the client's, as an object or as a function that makes it."""
    model = make("net")
    optimizer: Any = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1, eps=EPS)
    if how == "function":
        optimizer = lambda groups: torch.optim.AdamW(groups, lr=1e-2, weight_decay=0.1, eps=EPS)  # noqa: E731
    config = {key: value for key, value in settings(stage).items() if key != "optimizer"}
    engine, returned, _, schedule = twofold.initialize(
        model=model, optimizer=optimizer, model_parameters=model.parameters(), config=config
    )
    assert how == "function" or returned is optimizer
    assert schedule.get_last_lr() == [1e-3]
    return run(engine, rank, 2, 0, STEPS), whole(engine)


def rule_config(kind: str) -> dict[str, Any]:
    params = {"lr": 1e-3, **({"adam_w_mode": False} if kind == "Adam" else {})}
    return settings(2, optimizer={"type": kind, "params": params}, scheduler={})


KINDS = ("Lamb", "Lion", "Adagrad", "Muon", "Adam")
SUM = settings(2, gradient_clipping=0, optimizer={"type": "SGD", "params": {"lr": 1e-2}}, scheduler={})
CASES: dict[str, tuple[Any, ...]] = {
    **{f"{kind}-{stage}": (train, kind, settings(stage)) for kind in ("net", "gpt2") for stage in range(4)},
    **{f"llama-{stage}": (train, "llama", settings(stage)) for stage in (2, 3)},
    **{f"{how}-{stage}": (client, stage, how) for stage, how in ((3, "object"), (1, "function"))},
    **{kind: (train, "net", rule_config(kind)) for kind in KINDS},
    "mean": (train, "net", SUM),
    "sum": (train, "net", SUM | {"gradient_allreduce_op": "sum"}),
}


def every(rank: int) -> dict[str, Any]:
    return {name: work(rank, *args) for name, (work, *args) in CASES.items()}


@pytest.fixture(scope="module")
def found() -> dict[str, list[Any]]:
    """What both ranks have of every case; started once, for starting takes longer than training."""
    ranks = run_ranks(2, every)
    return {name: [rank[name] for rank in ranks] for name in CASES}


@pytest.mark.parametrize("case", [name for name, (work, *_) in CASES.items() if work is train and "-" in name])
def test_a_stage_is_the_plain_loop(found: dict[str, list[Any]], case: str) -> None:
    same(found[case], plain(case.partition("-")[0]))


@pytest.mark.parametrize("case", ["object-3", "function-1"])
def test_a_clients_optimizer(found: dict[str, list[Any]], case: str) -> None:
    same(found[case], plain("net"))


@pytest.mark.parametrize("kind", KINDS)
def test_rules_on_slices_are_the_rules_on_wholes(found: dict[str, list[Any]], kind: str) -> None:
    config = rule_config(kind) | {"train_micro_batch_size_per_gpu": 2 * MICRO}
    engine, *_ = twofold.initialize(model=make("net"), config=config)
    same(found[kind], (run(engine, 0, 1, 0, STEPS), whole(engine)))


def test_the_mean_of_ranks_or_their_sum(found: dict[str, list[Any]]) -> None:
    (mean, _), (total, _) = found["mean"][0], found["sum"][0]
    assert total[1] == pytest.approx(2 * mean[1], rel=1e-5)


def untested(rank: int) -> str:
    model = make("net")
    optimizer = torch.optim.Adafactor(model.parameters())
    with pytest.raises(ConfigError) as told:
        twofold.initialize(
            model=model, optimizer=optimizer, config={"train_batch_size": 4, "zero_optimization": {"stage": 1}}
        )
    return str(told.value)


# --------------------------------------------------------------------------------------------- narrow weights
def narrow(rank: int, dtype: str) -> tuple[list[float], set[str], float]:
    config = settings(3, scheduler={}, **{dtype: {"enabled": True}})
    engine, *_ = twofold.initialize(model=make("net"), config=config)
    seen = set()
    engine.module.blocks[0][1].register_forward_hook(lambda module, args, out: seen.add(str(out.dtype)))
    told = run(engine, rank, 2, 0, STEPS)
    return told, seen, engine.loss_scale


def overflow(rank: int) -> dict[str, Any]:
    """Three steps of fp16, the second of which overflows on rank 1 alone."""
    scaling = {"enabled": True, "initial_scale_power": 8, "hysteresis": 1}
    config = settings(2, gradient_accumulation_steps=1, fp16=scaling)
    engine, _, _, schedule = twofold.initialize(model=make("net"), config=config)
    told: dict[str, Any] = {"rates": [], "scales": [], "applied": [], "weights": []}
    for step in range(3):
        ids = data(step, 0)[rank * MICRO : (rank + 1) * MICRO]
        loss = engine(input_ids=ids, labels=ids)[0]
        engine.backward(loss * (float("inf") if (step, rank) == (1, 1) else 1.0))
        engine.step()
        told["rates"].append(schedule.last_batch_iteration)
        told["scales"].append(engine.cur_scale)
        told["applied"].append(engine.was_step_applied())
        told["weights"].append(whole(engine)["head.weight"])
    return told | {"skipped": engine.skipped_steps, "steps": engine.global_steps}


# --------------------------------------------------------------------------------------------- checkpoints
def save(rank: int, directory: Path, stage: int) -> list[float]:
    """Two steps, a checkpoint, and the two that follow."""
    engine, *_ = twofold.initialize(model=make("net", seed=rank), config=settings(stage))
    told = run(engine, rank, 2, 0, 2)
    engine.save_checkpoint(directory, client_state={"epoch": 3, "seen": [1, 2]})
    return told + run(engine, rank, 2, 2, STEPS)


def load(rank: int, directory: Path, stage: int) -> tuple[Any, list[float]]:
    engine, *_ = twofold.initialize(model=make("net", seed=7), config=settings(stage))
    return engine.load_checkpoint(directory), run(engine, rank, 2, 2, STEPS)


def rest(rank: int, directory: Path) -> dict[str, Any]:
    """All else that two ranks are asked in these tests."""
    return {
        "untested": untested(rank),
        "bf16": narrow(rank, "bf16"),
        "fp16": narrow(rank, "fp16"),
        "overflow": overflow(rank),
        "saved": save(rank, directory / "two", 3),
        "loaded": load(rank, directory / "two", 1),
        "from one": load(rank, directory / "one", 3),
        "unsynced": unsynced(rank),
        "loader": loader(),
        "hybrid": train(rank, "net", settings(3) | {"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 2}}),
        "int8": train(rank, "net", INT8),
    }


INT8 = settings(3) | {
    "zero_optimization": {"stage": 3, "zero_quantized_weights": True, "zero_quantized_gradients": True}
}


def unsynced(rank: int) -> list[float]:
    """Two micro-batches behind no_sync, the third reduces them all."""
    engine, *_ = twofold.initialize(model=make("net"), config=settings(1))
    told = []
    for step in range(2):
        for micro in range(GAS):
            mine = data(step, micro)[rank * MICRO : (rank + 1) * MICRO]
            with engine.no_sync() if micro < GAS - 1 else contextlib.nullcontext():
                engine.backward(engine(input_ids=mine, labels=mine)[0])
            engine.step()
        told.append(engine.get_global_grad_norm())
    return told


def loader() -> list[list[int]]:
    """What this rank reads of ten numbers in two rounds."""
    _, _, batches, _ = twofold.initialize(
        model=make("net"), config={"train_micro_batch_size_per_gpu": 2}, training_data=list(range(10))
    )
    return [[int(x) for batch in batches for x in batch] for _ in range(2)]


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    directory = tmp_path_factory.mktemp("checkpoints")
    engine, *_ = twofold.initialize(model=make("net"), config=ALONE)
    run(engine, 0, 1, 0, 2)
    engine.save_checkpoint(directory / "one")
    return directory, run_ranks(2, rest, directory)


ALONE = settings(0) | {"train_micro_batch_size_per_gpu": 2 * MICRO}
Others = tuple[Path, list[dict[str, Any]]]


def test_an_optimizer_that_is_not_for_slices(others: Others) -> None:
    for rank in others[1]:
        assert "Adafactor is not known to work on slices" in rank["untested"]
        assert "zero_allow_untested_optimizer" in rank["untested"]


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_narrow_weights_learn_as_wide_ones(others: Others, dtype: str) -> None:
    wide, _ = plain("net", lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1, eps=EPS))
    told, seen, scale = others[1][0][dtype]
    assert seen == {"torch.bfloat16" if dtype == "bf16" else "torch.float16"}
    assert scale == (1.0 if dtype == "bf16" else 2.0**16)
    assert told[1] == pytest.approx(wide[1], rel=2e-2)  # the first gradient, before rates differ
    assert told[-2] < told[0]


def test_an_overflow_on_one_rank_is_skipped_by_all(others: Others) -> None:
    for rank in others[1]:
        told = rank["overflow"]
        assert told["applied"] == [True, False, True]
        assert told["rates"] == [0, 0, 1]
        assert told["scales"] == [256.0, 128.0, 128.0]
        assert (told["skipped"], told["steps"]) == (1, 3)
        first, second, third = told["weights"]
        assert torch.equal(first, second) and not torch.equal(second, third)


def test_saved_at_two_ranks_gone_on_from_at_two_and_at_one(others: Others) -> None:
    directory, ranks = others
    undisturbed, _ = plain("net")
    for rank in ranks:
        (path, state), told = rank["loaded"]
        assert Path(path).name == "global_step2" and state == {"epoch": 3, "seen": [1, 2]}
        assert told == pytest.approx(rank["saved"][4:], abs=1e-6)
    engine, *_ = twofold.initialize(model=make("net", seed=9), config=ALONE)
    engine.load_checkpoint(directory / "two")
    assert engine.global_steps == 2
    assert run(engine, 0, 1, 2, STEPS) == pytest.approx(undisturbed[4:], abs=1e-5)


def test_saved_by_one_gone_on_from_by_two(others: Others) -> None:
    undisturbed, _ = plain("net")
    told = [rank["from one"][1] for rank in others[1]]
    losses = [(told[0][at] + told[1][at]) / 2 for at in (0, 2)]
    assert losses == pytest.approx(undisturbed[4::2], abs=1e-5)
    assert told[0][1::2] == pytest.approx(undisturbed[5::2], rel=1e-5, abs=1e-5)


def test_gradients_behind_no_sync_are_reduced_later(others: Others) -> None:
    wanted, _ = plain("net")
    assert others[1][0]["unsynced"] == pytest.approx(wanted[1:4:2], rel=1e-5)


def test_each_rank_reads_its_own(others: Others) -> None:
    one, two = (rank["loader"] for rank in others[1])
    for ours, theirs in zip(one, two):
        assert sorted(ours + theirs) == list(range(10))
    assert one[0] != one[1]


def test_hybrid_and_narrow_traffic(others: Others) -> None:
    wanted = plain("net")
    same([rank["hybrid"] for rank in others[1]], wanted)
    told = [rank["int8"][0] for rank in others[1]]
    losses = [(told[0][at] + told[1][at]) / 2 for at in range(0, 2 * STEPS, 2)]
    assert losses == pytest.approx(wanted[0][::2], rel=2e-2)
    assert losses != pytest.approx(wanted[0][::2], rel=1e-7)
