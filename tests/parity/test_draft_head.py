"""A draft head guesses as it was trained to, and whatever it guesses, the text is that of a token a step."""

from __future__ import annotations

import pytest
import torch

from tests.parity import tiny
from twofold.core import ConfigError
from twofold.engine import runner
from twofold.engine.eagle import PENDING, Eagle
from twofold.engine.speculation import Speculation
from twofold.models import PackedContext
from twofold.models.decoder import Decoder
from twofold.models.draft_head import Reading, config_for
from twofold.models.weights import spec_from

LLAMA = tiny.SPECS["llama"]


def head_for(target: Decoder, std: float = 0.25) -> Decoder:
    made = Decoder(spec_from(config_for(target.spec, "none", width=40)))
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
        made.join.weight[:, : made.spec.hidden] += torch.eye(made.spec.hidden)  # about what stood before
    return made


def guessing(
    target: Decoder, head: Decoder | None = None, *, wanted=3, adaptive=False, blocks=400, tokens=2048, **settings
):
    """An engine with a head beside it."""
    engine = tiny.engine(target, **settings)
    size = engine.config.block_size
    proposer = Eagle(head or head_for(target), target, num_blocks=blocks, block_size=size, tokens=tokens, eos_ids=(7,))
    engine.speculation = engine.scheduler.speculation = Speculation(proposer, most=wanted, adaptive=adaptive)
    engine.runner.watch = proposer.saw
    return engine, proposer


def requests(count=8, first=0, **params):
    return [tiny.request(number, **{"max_tokens": 24, **params}) for number in range(first, first + count)]


def calm(target, *asked, **settings):
    return tiny.run(tiny.engine(target, **settings), *asked)


@pytest.fixture(scope="module")
def llama():
    return tiny.decoder(LLAMA)


class Overheard:
    """A head's proposer, whose guesses are kept beside what they were made from."""

    def __init__(self, inner: Eagle) -> None:
        self.inner, self.kept = inner, []
        self.costs = True

    def propose(self, wanted):
        found = self.inner.propose(wanted)
        for row, _ in wanted:
            if row.serial in found:
                known = row.tokens(0, row.request.num_tokens)
                first = self.inner._held[row.serial].first
                self.kept.append((known, first, found[row.serial].tokens))
        return found

    def __getattr__(self, name):
        return getattr(self.inner, name)


def chained(target: Decoder, head: Decoder, known: tuple[int, ...], first: int, count: int) -> list[int]:
    """Greedy guesses computed anew from a whole text, whose hidden states from `first` on are known."""
    with torch.no_grad():
        ids = torch.tensor(known)
        seen = target(ids, PackedContext([len(ids)]))
        before = torch.cat((torch.zeros(1, seen.shape[1]), seen[first:-1]))
        text, found = list(known[first:]), []
        for _ in range(count):
            tokens = target.embedded(torch.tensor(text), torch.arange(len(text)))
            said = head.through(head.join(torch.cat((before, tokens), -1)), PackedContext([len(text)]))
            found.append(int(target.logits(said[-1:]).argmax()))
            before = torch.cat((before, said[-1:]))
            text.append(found[-1])
    return found


@pytest.mark.parametrize("settings", [{}, {"max_num_batched_tokens": 48, "max_num_seqs": 8}], ids=["whole", "chunks"])
def test_guesses_are_what_the_head_says_of_the_whole_text(llama, settings):
    engine, proposer = guessing(llama, **settings)
    overheard = engine.speculation.proposer = Overheard(proposer)
    tiny.run(engine, *requests(6, temperature=0.0, repetition_penalty=1.0, frequency_penalty=0.0))
    assert len(overheard.kept) > 60
    assert any(len(known) > 2 * PENDING for known, _, _ in overheard.kept), "some prompts were read before the guess"
    wrong = [
        known
        for known, first, tokens in overheard.kept
        if chained(llama, proposer.head, known, first, len(tokens)) != list(tokens)
    ]
    assert not wrong
    assert {first for _, first, _ in overheard.kept} == {0}


def test_a_head_that_is_trained_says_the_same_at_the_first_depth(llama):
    """What the trainer makes it say of a packed document is what it says beside the engine."""
    head = head_for(llama)
    reading = Reading(llama, 2)
    texts = [tiny.request(number).prompt_ids for number in (4, 5)]
    ids, lengths = torch.tensor([*texts[0], *texts[1]]), [len(text) for text in texts]
    with torch.no_grad():
        said = reading(head, ids, PackedContext(lengths)).view(2, len(ids), -1)
    ends = [lengths[0] - 1, sum(lengths) - 1]
    for text, end in zip(texts, ends):
        assert chained(llama, head, text, 0, 1) == [int(llama.logits(said[0, end : end + 1]).argmax())]
    shifted = said[0].roll(1, 0)
    shifted[[0, lengths[0]]] = 0.0
    with torch.no_grad():
        tokens = llama.embedded(ids, PackedContext(lengths).positions_T)
        again = head.through(head.join(torch.cat((shifted, tokens), -1)), PackedContext(lengths))
    assert torch.equal(said[1], again), "at the second depth it reads what it said itself"


CASES = {
    "plain": {},
    "chunks": {"max_num_batched_tokens": 48, "max_num_seqs": 8},
    "crowded": {"num_blocks": 30},
    "no cache": {"enable_prefix_caching": False},
    "int8 cache": {"kv_dtype": "int8"},
}


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_the_text_is_the_same(llama, case, adaptive):
    tokens = 80 if case == "crowded" else 24
    engine, proposer = guessing(llama, adaptive=adaptive, **CASES[case])
    said = tiny.run(engine, *requests(10, max_tokens=tokens))
    assert said == calm(llama, *requests(10, max_tokens=tokens), **CASES[case])
    stats = engine.stats()
    assert stats.draft_tokens > 0 and proposer.pool.used == 0
    assert case != "crowded" or stats.preemptions > 0
    proposer.pool.check_integrity([])


@pytest.mark.parametrize("spec", ["gemma2", "alibi", "moe"])
def test_heads_go_beside_every_kind_of_model(spec):
    target = tiny.decoder(tiny.SPECS[spec])
    engine, _ = guessing(target)
    assert tiny.run(engine, *requests(4)) == calm(target, *requests(4))
    assert engine.stats().draft_tokens > 0


def test_int8_weights_and_steps_that_are_not_compiled(monkeypatch):
    target = tiny.rounded(tiny.decoder(LLAMA), "int8")
    expected = calm(target, *requests(6))
    engine, _ = guessing(target)
    assert engine.runner.program is not None
    assert tiny.run(engine, *requests(6)) == expected
    monkeypatch.setattr(runner, "why_not", lambda decoder: "layers one by one")
    engine, _ = guessing(target)
    assert engine.runner.program is None
    assert tiny.run(engine, *requests(6)) == expected


def test_tokens_of_the_prefix_cache_have_no_hidden_states(llama):
    """The second time the text begins for the head where the cache ends, and its guesses are those of such a text."""
    expected = calm(llama, *requests(4, length=80, temperature=0.0, repetition_penalty=1.0, frequency_penalty=0.0))
    engine, proposer = guessing(llama)
    overheard = engine.speculation.proposer = Overheard(proposer)
    for turn in range(2):
        overheard.kept.clear()
        asked = requests(4, length=80, temperature=0.0, repetition_penalty=1.0, frequency_penalty=0.0)
        assert tiny.run(engine, *asked) == expected
        assert {first for _, first, _ in overheard.kept} == ({64} if turn else {0})
        for known, first, tokens in overheard.kept[::7]:
            assert chained(llama, proposer.head, known, first, len(tokens)) == list(tokens)
    assert engine.stats().prefix_hits > 0


def test_a_right_head_is_believed(llama):
    """A model whose layers add nothing says of a token what its embedding says, and a head can know that."""
    target = tiny.decoder(LLAMA)
    with torch.no_grad():
        for layer in target.layers:
            layer.out.weight.zero_()
            layer.down.weight.zero_()
        target.norm.weight.fill_(1.0)
    head = head_for(target)
    with torch.no_grad():
        for name, parameter in head.named_parameters():
            if name.startswith(("layers.0.out", "layers.0.down")):
                parameter.zero_()
        head.join.weight[:] = torch.cat((torch.zeros(44, 44), torch.eye(44)), 1)
    asked = {"temperature": 0.0, "repetition_penalty": 1.0, "frequency_penalty": 0.0, "max_tokens": 25}
    engine, _ = guessing(target, head)
    said = tiny.run(engine, *requests(4, **asked))
    assert said == calm(target, *requests(4, **asked))
    stats = engine.stats()
    assert stats.acceptance == 1.0 and stats.accepted_per_pos[2] > 4 * 4


def test_sleep_new_weights_and_ends_in_the_middle(llama):
    target = tiny.decoder(LLAMA)
    other = tiny.decoder(LLAMA)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.1)
    engine, proposer = guessing(target)
    plain = tiny.engine(target)
    said, expected = tiny.Said(), tiny.Said()
    for on, heard in ((engine, said), (plain, expected)):
        for each in requests(4, max_tokens=16):
            on.submit(each)
        while min((len(heard.get(f"r{n}", ())) for n in range(4)), default=0) < 4:
            heard.hear(on.step())
        on.sleep()
        on.wake()
        on.abort("r3")
        while on.has_work:
            heard.hear(on.step())
    assert proposer.pool.used == 0 and proposer.cache is not None
    for name in ("r0", "r1", "r2"):
        assert said[name] == expected[name]
    engine.exchange(other, version=1)
    assert proposer.target is other
    assert tiny.run(engine, *requests(4)) == calm(other, *requests(4))
    assert proposer.pool.used == 0


def test_numbers_that_are_not_finite_harm_nobody(llama):
    head = head_for(llama)
    with torch.no_grad():
        head.join.weight[3, 3] = float("nan")
    engine, proposer = guessing(llama, head)
    assert tiny.run(engine, *requests(4)) == calm(llama, *requests(4))
    assert engine.stats().draft_tokens == 0 and proposer.pool.used == 0


@pytest.mark.parametrize("blocks", [2, 12])
def test_little_room_for_its_own_cache(llama, blocks):
    engine, proposer = guessing(llama, blocks=blocks)
    assert tiny.run(engine, *requests(8)) == calm(llama, *requests(8))
    assert engine.stats().draft_tokens > 0 and proposer.pool.used == 0


def test_beams_and_scored_prompts_beside_guesses(llama):
    def mixed():
        beams = [
            tiny.request(n, length=40, temperature=0.0, use_beam_search=True, n=2, beam_width=3, **none)
            for n in (20, 24)
        ]
        scored = [tiny.request(n, length=90, prompt_logprobs=1) for n in (29, 30)]
        return [*beams, *scored, *requests(5)]

    none = {"logprobs": None, "repetition_penalty": 1.0, "frequency_penalty": 0.0}
    for tokens in (2048, 3):  # three rows are kept at most: others begin anew
        engine, proposer = guessing(llama, tokens=tokens)
        said, expected = tiny.run(engine, *mixed()), calm(llama, *mixed())
        assert said == expected and said.prompts == expected.prompts
        for name in ("r20", "r24"):
            ours, theirs = ([beam.tokens for beam in heard.ends[name].beams] for heard in (said, expected))
            assert ours == theirs and len(ours) == 2
        assert engine.stats().draft_tokens > 0 and proposer.pool.used == 0
        assert len(proposer._held) <= tokens


def test_heads_of_other_shapes_are_refused(llama):
    other = tiny.decoder(tiny.SPECS["llama"])
    with pytest.raises(ConfigError, match="not a draft head"):
        Eagle(other, llama, num_blocks=4, block_size=16, tokens=16)
    wide = config_for(llama.spec, "") | {"hidden_size": 64}
    with pytest.raises(ConfigError, match="64 wide with 131 tokens, and this one is 44 wide"):
        Eagle(Decoder(spec_from(wide)), llama, num_blocks=4, block_size=16, tokens=16)
    short = config_for(llama.spec, "") | {"max_position_embeddings": 64}
    with pytest.raises(ConfigError, match="made for 64 tokens, the model for 512"):
        Eagle(Decoder(spec_from(short)), llama, num_blocks=4, block_size=16, tokens=16)
    with pytest.raises(ConfigError, match="only guesses for the model"):
        tiny.engine(head_for(llama))
