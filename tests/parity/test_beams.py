"""Beam search against transformers' `generate(num_beams=...)`: the same sequences in one order, and their scores."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import transformers

from tests.parity import tiny, zoo
from twofold.engine import paged
from twofold.engine.config import EngineConfig
from twofold.engine.engine import Engine
from twofold.engine.request import Output, Request
from twofold.engine.sampling import SamplingParams
from twofold.kernels import native
from twofold.models import Decoder, load

NEW_TOKENS = 14
LENGTHS = (40, 9, 27)
Pair = tuple[transformers.PreTrainedModel, Decoder, tuple[int, ...]]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Any:
    @functools.cache
    def made(name: str) -> Pair:
        path = tmp_path_factory.mktemp(name)
        model, decoder = zoo.save(zoo.ZOO[name], path), load(path, max_len=zoo.ZOO[name].max_len)
        return model, decoder, ends(model, prompts(decoder.spec.vocab))

    return made


def prompts(vocab: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(1, vocab, (length,), generator=generator).tolist() for length in LENGTHS]


def searched(decoder: Decoder, asked: list[Request], eos: tuple[int, ...] = (), **settings: Any) -> dict[str, Output]:
    """The last Output of each request; nothing came before it, and no block is left."""
    dials = {"num_blocks": 64, "max_num_seqs": 32, "max_num_batched_tokens": 64, **settings}
    engine = Engine(decoder, EngineConfig(**dials), eos_ids=eos)
    for request in asked:
        engine.submit(request)
    found: dict[str, Output] = {}
    while engine.has_work:
        for output in engine.step():
            assert output.request_id not in found
            if output.finish is not None:
                found[output.request_id] = output
        engine.scheduler.check_integrity()
    assert engine.pool.used == 0
    return found


def search(prompt: list[int], name: str = "r", **params: Any) -> Request:
    usual = {"temperature": 0.0, "use_beam_search": True, "max_tokens": NEW_TOKENS}
    return Request(id=name, prompt_ids=tuple(prompt), params=SamplingParams(**(usual | params)))


def theirs(
    model: transformers.PreTrainedModel, prompt: list[int], eos: tuple[int, ...], **how: Any
) -> list[tuple[list[int], float]]:
    ids = torch.tensor([prompt])
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        eos_token_id=list(eos) or None,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_scores=True,
        **how,
    )
    found = []
    for row, score in zip(out.sequences[:, len(prompt) :].tolist(), out.sequences_scores.tolist()):
        end = next((at + 1 for at, token in enumerate(row) if token in eos), len(row))
        found.append((row[:end], score))
    return found


def ours(output: Output) -> list[tuple[list[int], float]]:
    return [([token.id for token in beam.tokens], beam.score) for beam in output.beams]


def same(mine: list[Any], expected: list[Any]) -> None:
    assert [ids for ids, _ in mine] == [ids for ids, _ in expected]
    assert [score for _, score in mine] == pytest.approx([score for _, score in expected], abs=1e-4)


def ends(model: transformers.PreTrainedModel, asked: list[list[int]]) -> tuple[int, ...]:
    """Ids that beams meet: some that a beam search without ends says in its middle."""
    said = [theirs(model, prompt, (), num_beams=3, num_return_sequences=3) for prompt in asked]
    return tuple(dict.fromkeys(ids[place] for found in said for (ids, _), place in zip(found, (4, 7, 9))))


WAYS: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "2": (2, {}, {}),
    "3-true": (3, {"early_stopping": True}, {"early_stopping": True}),
    "4-never": (4, {"early_stopping": "never"}, {"early_stopping": "never"}),
    "5": (5, {}, {}),
    "4-long": (4, {"length_penalty": 2.0}, {"length_penalty": 2.0}),
    "4-short-never": (4, {"length_penalty": -0.7, "early_stopping": "never"},
                      {"length_penalty": -0.7, "early_stopping": "never"}),
    "3-canonical": (3, {"length_penalty": 0.0, "early_stopping": "never"},
                    {"length_penalty": 0.0, "early_stopping": "never"}),
    "4-repeat": (4, {"repetition_penalty": 1.6}, {"repetition_penalty": 1.6}),
    "3-least": (3, {"min_tokens": 6, "early_stopping": True}, {"min_new_tokens": 6, "early_stopping": True}),
    "3-bad": (3, {"bad_words_ids": ((5,), (11, 12), (90, 3, 4))}, {"bad_words_ids": [[5], [11, 12], [90, 3, 4]]}),
    "3-bias": (3, {"logit_bias": {3: 2.5, 60: 1.5, 17: -4.0}},
               {"sequence_bias": [[[3], 2.5], [[60], 1.5], [[17], -4.0]]}),
}  # fmt: skip


CASES = [
    *(("llama", way) for way in WAYS),
    *((family, way) for family in ("gpt2", "gemma2", "qwen3-moe", "bloom") for way in ("3-true", "4-short-never")),
    *(("gemma2", "5"), ("bloom", "4-repeat"), ("qwen3-moe", "3-bad"), ("gpt2", "3-canonical")),
]


@pytest.mark.parametrize(("family", "way"), CASES)
def test_sequences_and_scores_are_theirs(pairs: Any, family: str, way: str) -> None:
    model, decoder, eos = pairs(family)
    width, mine, their = WAYS[way]
    asked = prompts(decoder.spec.vocab)
    n = max(1, width - 1)
    requests = [search(prompt, str(i), n=n, beam_width=width, **mine) for i, prompt in enumerate(asked)]
    found = searched(decoder, requests, eos)
    ended = 0
    for i, prompt in enumerate(asked):
        expected = theirs(model, prompt, eos, num_beams=width, num_return_sequences=n, **their)
        same(ours(found[str(i)]), expected)
        ended += sum(len(ids) < NEW_TOKENS for ids, _ in expected)
    assert ended or family != "llama" or way in ("4-long", "3-least"), "some must end before the limit"


# -- the engine's own contract: the same bits, whatever runs beside a search and wherever its blocks lie ---------------
def kinds() -> dict[str, tuple[Any, Any, str]]:
    return {
        "llama": (tiny.SPECS["llama"], torch.float32, "auto"),
        "moe-bf16": (tiny.SPECS["moe"], torch.bfloat16, "bfloat16"),
        "gemma2-int4-kv-int8": (tiny.SPECS["gemma2"], "int4", "int8"),
        "walk": (tiny.SPECS["alibi"], torch.float32, "auto"),
    }


@pytest.fixture(params=kinds())
def served(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    spec, format, kv_dtype = kinds()[request.param]
    if kv_dtype == "int8" and native.missing():
        pytest.skip(f"an int8 cache needs the CPU kernels: {native.missing()}")
    if request.param == "walk":
        monkeypatch.setattr(paged.native, "missing", lambda: "left out by this test")
    made = tiny.rounded(tiny.decoder(spec), format) if isinstance(format, str) else tiny.decoder(spec, format)

    def run(*requests: Request, **settings: Any) -> tuple[dict[str, Output], Engine]:
        engine = tiny.engine(made, **{"kv_dtype": kv_dtype, **settings})
        return tiny.run(engine, *requests).ends, engine

    return run


def group(number: int, **params: Any) -> Request:
    usual = {"n": 3, "beam_width": 3, "max_tokens": 20, "logprobs": 2, "ignore_eos": True, "early_stopping": "never"}
    prompt = list(tiny.request(number, length=30 + number).prompt_ids)
    return search(prompt, f"b{number}", **(usual | params))


def test_a_search_has_its_bits_in_any_company(served: Any) -> None:
    alone = {f"b{i}": served(group(i))[0][f"b{i}"].beams for i in range(2)}
    assert all(token.logprob is not None and len(token.top) == 2 for token in alone["b0"][0].tokens)
    others = [tiny.request(i, length=20) for i in range(6)]
    together, _ = served(*others[:3], *(group(i) for i in range(2)), *others[3:])
    cut, _ = served(*(group(i) for i in range(2)), max_num_batched_tokens=9, max_num_seqs=9)
    bare, _ = served(*(group(i) for i in range(2)), enable_prefix_caching=False)
    tight, engine = served(*(group(i) for i in range(2)), num_blocks=11)
    blind, pressed = served(*(group(i) for i in range(2)), num_blocks=11, enable_prefix_caching=False)
    assert engine.stats().preemptions and pressed.stats().preemptions
    for found in (together, cut, bare, tight, blind):
        assert {name: found[name].beams for name in alone} == alone


def test_a_warm_prefix_changes_nothing(served: Any) -> None:
    first, engine = served(group(4))
    again = group(4)
    assert tiny.run(engine, again).ends["b4"].beams == first["b4"].beams and again.num_cached == 32


def test_sleep_and_new_weights_in_the_middle_change_no_search(served: Any) -> None:
    calm, _ = served(group(1))
    _, engine = served()
    engine.submit(group(1))
    for _ in range(7):
        engine.step()
    engine.sleep()
    engine.wake()
    engine.step()
    engine.load_weights(None, version=1)
    found = {output.request_id: output for _ in range(40) for output in (engine.step() if engine.has_work else [])}
    assert found["b1"].beams == calm["b1"].beams


def test_logprobs_in_every_mode_are_those_of_the_tokens(served: Any) -> None:
    edits: dict[str, Any] = {"logit_bias": {5: 1.5}, "repetition_penalty": 1.3}
    modes = {mode: served(group(2, logprobs_mode=mode, **edits))[0]["b2"].beams for mode in ("raw", "processed")}
    for raw, edited in zip(*modes.values(), strict=True):
        assert [token.id for token in raw.tokens] == [token.id for token in edited.tokens]
        summed = sum(token.logprob or 0.0 for token in edited.tokens)
        assert summed == pytest.approx(edited.cumulative_logprob, abs=1e-6) and raw.score == edited.score
        again = Request(
            id="check",
            prompt_ids=(*group(2).prompt_ids, *(token.id for token in raw.tokens)),
            params=SamplingParams(max_tokens=1, prompt_logprobs=2),
        )
        scored = tiny.run(served()[1], again).prompts["check"]
        assert [token.logprob for token in scored[-len(raw.tokens) :]] == [token.logprob for token in raw.tokens]
        assert [token.top for token in scored[-len(raw.tokens) :]] == [token.top for token in raw.tokens]
