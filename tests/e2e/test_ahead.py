"""One step ahead: each batch is made by weights that are one update old, whoever is faster; and killed runs repeat."""

from __future__ import annotations

import json
import time

import pytest
import torch

from tests.parity import tiny
from tests.parity.bare_words import BareWords, prompt
from twofold.align.ahead import Ahead
from twofold.align.episode import Group
from twofold.align.remote import RemoteEngine
from twofold.align.remote_config import RemoteConfig
from twofold.align.rollout import rollout
from twofold.core import CheckpointError, StateError, WorkerError
from twofold.engine.config import EngineConfig
from twofold.engine.sampling import SamplingParams
from twofold.models.weights import decoder_tensors, spec_from

MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": tiny.VOCAB,
    "hidden_size": 40,
    "intermediate_size": 52,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}
STEPS = 5
KIND = tuple[Group, ...]


class Policy:
    """A trainer: its update is a function of the batch, down to the bits of its log-probabilities."""

    def __init__(self) -> None:
        self.decoder = tiny.decoder(spec_from(MODEL))

    def update(self, groups: tuple[Group, ...]) -> None:
        told = sum(sum(r.logprobs) + sum(r.ids) / 97 for g in groups for r in g.rollouts)
        with torch.no_grad():
            for parameter in self.decoder.parameters():
                parameter.mul_(1 + 0.01 * (told % 1.0))

    def sent(self):
        return decoder_tensors(self.decoder)


def roller(engine, slow=0.0):
    """Rollouts of a step's prompts, with a tool in between that takes its time; groups in the prompts' order."""

    def tool(_, messages):
        time.sleep(slow)
        return (50, 51) if len(messages) < 3 else None

    def roll(step: int) -> tuple[Group, ...]:
        prompts = [prompt(number, 5 + number) for number in (2 * step, 2 * step + 1)]
        params = SamplingParams(max_tokens=24, stop_token_ids=tuple(range(90, 94)), ignore_eos=True)
        found = rollout(engine, prompts, 2, params, seed=7, words=BareWords(), turn=tool)
        return tuple(sorted(found, key=lambda group: group.prompt.number))

    return roll


def start() -> RemoteEngine:
    config = EngineConfig(num_blocks=200, max_num_seqs=8, max_num_batched_tokens=64)
    return RemoteEngine(MODEL, config, remote=RemoteConfig(threads=1, bucket_mb=0.02))


def run(policy, ahead, first=0, last=STEPS, slow=0.0, saved=None):
    """Batches of some steps; `saved` collects (state, weights) as checkpoints behind each update."""
    batches = []
    ahead.send(policy.sent(), first)
    for step in range(first, last):
        batch = ahead.take(step)
        time.sleep(slow)
        policy.update(batch)
        ahead.send(policy.sent(), step + 1)
        if saved is not None:
            weights = {name: p.detach().clone() for name, p in policy.decoder.named_parameters()}
            saved.append((json.dumps(ahead.state()), weights))
        batches.append(batch)
    return batches


def test_batches_are_one_update_old_and_do_not_depend_on_who_is_faster():
    found = []
    for trainer, generator in ((0.1, 0.0), (0.0, 0.1)):
        with start() as engine:
            ahead = Ahead(engine, roller(engine, generator), KIND, steps=STEPS)
            found.append(run(Policy(), ahead, slow=trainer))
    assert found[0] == found[1]
    versions = [{v for g in batch for r in g.rollouts for v in r.versions} for batch in found[0]]
    assert versions == [{0}, {0}, {1}, {2}, {3}]


def test_a_run_that_is_killed_and_resumed_repeats_itself():
    saved = []
    with start() as engine:
        whole = run(Policy(), Ahead(engine, roller(engine), KIND, steps=STEPS), saved=saved)
    assert saved[-1][0] == "null"  # nothing is rolled out behind the last step
    for killed in (1, 3):
        state, weights = saved[killed - 1]
        policy = Policy()
        policy.decoder.load_state_dict(weights, strict=False)
        with start() as engine:
            ahead = Ahead(engine, roller(engine), KIND, steps=STEPS)
            ahead.restore(json.loads(state))
            assert run(policy, ahead, first=killed) == whole[killed:]


def test_faults_of_rollouts_are_the_takers_and_what_cannot_be_is_refused():
    with start() as engine:
        roll = roller(engine)

        def fails(step):
            if step == 2:
                raise WorkerError("the sandbox is gone")
            return roll(step)

        ahead = Ahead(engine, fails, KIND, steps=STEPS)
        with pytest.raises(CheckpointError, match="cannot be read"):
            ahead.restore({"step": 1, "batch": [{"prompt": 3}]})
        ahead.send(Policy().sent(), 0)
        ahead.take(0)
        with pytest.raises(StateError, match="step 1 is under way, not 3"):
            ahead.take(3)
        with pytest.raises(StateError, match="restore before"):
            ahead.restore(None)
        ahead.take(1)
        with pytest.raises(WorkerError, match="sandbox"):
            ahead.take(2)


def test_the_death_of_the_generator_reaches_the_trainer():
    with start() as engine:
        ahead = Ahead(engine, roller(engine, 0.05), KIND, steps=STEPS)
        ahead.send(Policy().sent(), 0)
        ahead.take(0)
        engine._child.kill()
        with pytest.raises(WorkerError, match="signal 9"):
            ahead.take(1)
            ahead.take(2)
