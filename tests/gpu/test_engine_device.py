"""The engine on the device, end to end: one bit pattern for a token alone, among others, in chunks, decoded by replayed
graphs, and in the trainer; and the tokens of another run."""

from __future__ import annotations

import pytest
import torch

from tests.parity import tiny

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]

MODELS = [(name, torch.float32) for name in tiny.SPECS] + [("llama", torch.bfloat16), ("moe", torch.bfloat16)]


@pytest.fixture(scope="module", params=MODELS, ids=str)
def model(request):
    name, dtype = request.param
    return tiny.decoder(tiny.SPECS[name], dtype).to("cuda")


def test_alone_is_as_among_31_others(model):
    together = tiny.run(tiny.engine(model), *(tiny.request(i, prompt_logprobs=1) for i in range(32)))
    assert len({tuple(t.id for t in tokens) for tokens in together.values()}) > 20, "the texts differ from each other"
    for number in (0, 1, 2, 3, 17, 30):
        alone = tiny.run(tiny.engine(model), tiny.request(number, prompt_logprobs=1))
        assert alone[f"r{number}"] == together[f"r{number}"]
        assert alone.prompts[f"r{number}"] == together.prompts[f"r{number}"]


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_a_prompt_in_chunks_is_as_the_whole_prompt(model, chunk):
    for number in (1, 3):
        whole = tiny.run(tiny.engine(model), tiny.request(number, length=150, prompt_logprobs=2))
        cut = tiny.engine(model, max_num_batched_tokens=chunk, max_num_seqs=1)
        parts = tiny.run(cut, tiny.request(number, length=150, prompt_logprobs=2))
        assert parts == whole and parts.prompts == whole.prompts


def test_replayed_steps_are_as_launched_ones(model, monkeypatch):
    from twofold.engine.graphs import DecodeGraphs

    requests = range(8, 20)
    engine = tiny.engine(model)
    replayed = tiny.run(engine, *(tiny.request(i) for i in requests))
    assert engine.runner.cuda is not None and engine.runner.cuda.graphs._graphs, "decode steps were captured"
    monkeypatch.setattr(DecodeGraphs, "takes", lambda *_: False)
    assert tiny.run(tiny.engine(model), *(tiny.request(i) for i in requests)) == replayed


@torch.inference_mode()
def test_the_engines_bits_are_the_trainers(model):
    from twofold.models.packed import PackedContext

    request = tiny.request(4, length=150, prompt_logprobs=0, temperature=0.0, logprobs=0)
    engine = tiny.engine(model, max_num_batched_tokens=40, max_num_seqs=1)
    said = tiny.run(engine, request)
    text = torch.tensor([*request.prompt_ids, *(token.id for token in said["r4"])], device="cuda")
    logits = model.logits(model(text, PackedContext([len(text)], "cuda")))
    truth = torch.log_softmax(logits[:-1], -1).gather(1, text[1:, None])[:, 0].tolist()
    told = [token.logprob for token in (*said.prompts["r4"], *said["r4"])]
    assert told[0] is None and told[1:] == truth


def test_an_int8_cache_serves(model):
    said = tiny.run(tiny.engine(model, kv_dtype="int8"), *(tiny.request(i) for i in range(4)))
    assert all(len(tokens) == 12 for tokens in said.values())
