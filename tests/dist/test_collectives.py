"""What is counted of collectives is what was said: plain calls, our own with gradients, a step of sharded layers."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from world import run_ranks

from twofold.models.decoder import Decoder
from twofold.models.packed import PackedContext
from twofold.models.weights import spec_from
from twofold.parallel import Mesh, ParallelConfig
from twofold.parallel.comm import gather, reduce_from
from twofold.parallel.layout import lay_out
from twofold.train import loss as losses
from twofold.train.collectives import Collectives, Total, sent, table
from twofold.train.init import init_weights
from twofold.train.kept import Disk
from twofold.train.recompute import recompute_layers
from twofold.train.zero import Zero

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 96, "hidden_size": 32,
    "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 128, "rms_norm_eps": 1e-5, "hidden_act": "silu", "tie_word_embeddings": True,
}  # fmt: skip
Found = dict[str, tuple[int, int, int, int]]


def flat(found: dict[tuple[str, str], Total]) -> Found:
    """(ranks, calls, bytes, sent) of each collective, all groups together; every one took time."""
    out: Found = {}
    for (name, _), it in found.items():
        assert it.seconds > 0
        _, calls, size, away = out.get(name, (0, 0, 0, 0))
        out[name] = it.ranks, calls + it.calls, size + it.bytes, away + it.sent
    return out


def plain(rank: int) -> Found:
    with Collectives() as comm:
        for _ in range(2):
            dist.all_reduce(torch.full((100,), float(rank)))
        whole = torch.empty(60)
        dist.all_gather_into_tensor(whole, torch.full((30,), float(rank)))
        dist.reduce_scatter_tensor(torch.empty(30), whole)
        dist.broadcast(torch.zeros(7, dtype=torch.int64), 0)
        dist.all_to_all_single(torch.empty(10), torch.empty(10))
        dist.barrier()
        torch.ones(4) + 1
        late = dist.all_reduce(torch.ones(5), async_op=True)
        late.wait()
    assert whole.tolist() == [0.0] * 30 + [1.0] * 30
    assert "all_to_all" in table(comm.found)
    return flat(comm.found)


def test_plain_calls() -> None:
    expected = {
        "all_reduce": (2, 3, 820, 820),
        "all_gather": (2, 1, 240, 120),
        "reduce_scatter": (2, 1, 240, 120),
        "broadcast": (2, 1, 56, 56),
        "all_to_all": (2, 1, 40, 20),
        "barrier": (2, 1, 0, 0),
    }
    assert run_ranks(2, plain) == [expected, expected]


def with_gradients(rank: int) -> Found:
    x = torch.ones(6, 4, requires_grad=True)
    with Collectives() as comm:
        world = dist.group.WORLD
        (gather(reduce_from(x, world), world, add=True) ** 2).sum().backward()
    return flat(comm.found)


def test_calls_of_a_backward_pass_count() -> None:
    for found in run_ranks(2, with_gradients):
        assert found == {
            "all_reduce": (2, 1, 96, 96),
            "all_gather": (2, 1, 192, 96),
            "reduce_scatter": (2, 1, 192, 96),
        }


def sharded(rank: int, policy: str, disk: bool) -> tuple[Found, int, dict[str, torch.Tensor]]:
    """The second step of a decoder that is sharded over all ranks: what it said, its size, its gradients."""
    mesh = Mesh(lay_out(ParallelConfig(zero=3), dist.get_world_size()), rank)
    decoder = Decoder(spec_from(CONFIG))
    init_weights(decoder, 5)
    numbers = 4 * sum(p.numel() for p in decoder.parameters())
    recompute_layers(decoder, policy, keeper=Disk() if disk else None)
    zero = Zero(decoder, mesh)

    def step() -> None:
        ids = torch.arange(40) % 90 + rank
        zero.micro_batch(last=True)
        losses.backward(decoder, decoder(ids, PackedContext((25, 15))), ids.roll(-1), 80, 96)

    step()
    decoder.zero_grad()
    with Collectives() as comm:
        step()
    grads = {name: p.grad.full_tensor() for name, p in decoder.named_parameters()}
    assert {name for name, p in decoder.named_parameters() if p.requires_grad} == set(grads)
    return flat(comm.found), numbers, grads


CASES = [("selective", False), ("full", False), ("ffn", True), ("selective", True)]


@pytest.mark.parametrize(("policy", "disk"), CASES)
def test_a_step_of_sharded_layers_under_every_policy(policy: str, disk: bool) -> None:
    (found, numbers, grads), other = run_ranks(2, sharded, policy, disk)
    assert found == other[0]
    # the layers' weights are gathered for forward and for backward, the rest once; every gradient is reduced once
    gathered, reduced = found["all_gather"], found["reduce_scatter"]
    assert reduced[2] == numbers and numbers < gathered[2] < 2 * numbers
    assert 2 * gathered[3] == gathered[2] and 2 * reduced[3] == reduced[2]
    plainly = run_ranks(2, sharded, "none", False)[0][2]
    assert not [name for name, grad in grads.items() if not torch.equal(grad, plainly[name])]


def test_what_a_ring_sends() -> None:
    assert [sent(name, 120, 4) for name in ("all_reduce", "all_gather", "broadcast", "recv")] == [180, 90, 120, 0]
