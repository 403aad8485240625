"""rollout(): what comes out, in any company, through tools, stops, errors and new weights; and what stays behind."""

from __future__ import annotations

import threading

import pytest
import torch

from tests.parity import tiny
from tests.parity.bare_words import END, OPEN, BareWords, prompt
from twofold.align.rollout import rollout
from twofold.commands.model import model_dir
from twofold.core import ConfigError, RequestError, StateError
from twofold.data import TextStream, Tokenizer
from twofold.engine.sampling import SamplingParams

WORDS = BareWords()
LLAMA = tiny.decoder(tiny.SPECS["llama"])
PARAMS = SamplingParams(temperature=0.9, max_tokens=12)
END_SOON = SamplingParams(temperature=0.9, max_tokens=30, logit_bias={END: 4.0})
"""Most turns end by themselves."""


def roll(prompts, n=3, params=PARAMS, *, engine=None, words=WORDS, seed=5, **how):
    engine = engine or tiny.engine(LLAMA)
    groups = list(rollout(engine, prompts, n, params, seed=seed, words=words, **how))
    assert not engine.has_work and engine.pool.used == 0
    return {group.prompt.number: group for group in groups}


def test_a_group_is_every_sample_in_order_with_all_that_is_known_of_each_token():
    prompts = [prompt(i, 20 + i) for i in range(4)]
    found = roll(prompts)
    assert [found[i].prompt for i in range(4)] == prompts
    for group in found.values():
        assert [each.sample for each in group.rollouts] == [0, 1, 2]
        assert len({each.ids for each in group.rollouts}) == 3
        for each in group.rollouts:
            assert 0 < len(each.ids) == len(each.logprobs) == len(each.mine) == len(each.versions) <= 12
            assert all(each.mine) and set(each.versions) == {0} and max(each.logprobs) < 0.0
            assert each.finish == ("stop" if each.ids[-1] == END else "length")
            spoken = each.ids[:-1] if each.finish == "stop" else each.ids
            assert each.text.split() == [str(token) for token in spoken if token != OPEN]


def test_company_order_and_seats_change_nothing_but_the_seed_does():
    prompts = [prompt(i, 10 + 9 * i) for i in range(6)]
    long = PARAMS.with_(max_tokens=40)
    calm = roll(prompts, params=long)
    tight = tiny.engine(LLAMA, num_blocks=12, max_num_seqs=6, max_num_batched_tokens=16)
    assert roll(reversed(prompts), params=long, engine=tight) == calm and tight.stats().preemptions > 0
    assert roll(prompts[3:4], n=2, params=long)[3].rollouts == calm[3].rollouts[:2]
    assert roll(prompts[:1], params=long, seed=6)[0].rollouts != calm[0].rollouts


@pytest.mark.parametrize(("length", "each"), [(64, 16), (65, 1), (50, 2), (11, 11)])
def test_samples_of_a_group_share_what_blocks_can_be_shared(length, each):
    """The first computes the prompt; the others what lies behind its last full block before the last token."""
    engine = tiny.engine(LLAMA)
    roll([prompt(1, length)], n=5, params=SamplingParams(max_tokens=1), engine=engine)
    assert engine.stats().computed_tokens == length + 4 * each
    chunks = tiny.engine(LLAMA, max_num_seqs=8, max_num_batched_tokens=16)
    roll([prompt(1, length)], n=5, params=SamplingParams(max_tokens=1), engine=chunks)
    assert chunks.stats().computed_tokens == length + 4 * each, "they wait for the whole of it"


def test_a_long_list_of_prompts_is_read_as_the_engine_has_room():
    engine, read = tiny.engine(LLAMA, max_num_seqs=4), []

    def many():
        for number in range(100):
            read.append(number)
            yield prompt(number, 12)

    groups = rollout(engine, many(), 2, PARAMS, seed=1, words=WORDS)
    assert not read and next(groups).prompt.number <= 4
    assert len(read) <= 8 and engine.stats().running + engine.stats().waiting <= 2 * 4
    assert len([*groups]) == 99


def test_groups_come_when_they_are_finished_not_in_the_order_of_prompts():
    many = [prompt(i, 20) for i in range(8)]
    came = [len(g.rollouts[0].ids) for g in rollout(tiny.engine(LLAMA), many, 1, END_SOON, seed=3, words=WORDS)]
    assert came == sorted(came) and len(set(came)) > 3


def test_a_closed_rollout_leaves_nothing_in_the_engine():
    engine = tiny.engine(LLAMA)
    groups = rollout(engine, (prompt(i, 30) for i in range(50)), 4, PARAMS, seed=1, words=WORDS)
    next(groups)
    assert engine.pool.used > 0
    groups.close()
    assert not engine.has_work and engine.pool.used == 0
    engine.scheduler.check_integrity()
    assert roll([prompt(0, 30)], engine=engine) == roll([prompt(0, 30)])


def test_a_raising_source_or_tool_leaves_nothing_in_the_engine():
    engine = tiny.engine(LLAMA)

    def broken():
        yield prompt(0, 30)
        raise OSError("no more data")

    def tool(_, messages):
        raise ValueError("the tool broke")

    for source, turn, error in ((broken(), None, OSError), ([prompt(0, 9)], tool, ValueError)):
        with pytest.raises(error):
            list(rollout(engine, source, 6, END_SOON, seed=1, words=WORDS, turn=turn))
        assert not engine.has_work and engine.pool.used == 0


@pytest.mark.parametrize("waiting", [False, True])
def test_enough_is_enough_while_tokens_come_and_while_a_tool_hangs(waiting):
    engine, seen, let_go = tiny.engine(LLAMA), [], threading.Event()
    asked = [0]

    def until() -> bool:
        asked[0] += 1
        return bool(seen) if waiting else asked[0] > 5

    def tool(given, messages):
        seen.append(given.number)
        let_go.wait(20)

    try:
        found = list(rollout(engine, [prompt(0, 9)], 4, END_SOON, seed=1, words=WORDS, turn=tool, until=until))
    finally:
        let_go.set()
    assert not found and not engine.has_work and engine.pool.used == 0


def test_a_request_the_engine_refuses_is_told_and_stops_nobody():
    found = roll([prompt(0, 600), prompt(1, 20)])
    assert {each.finish for each in found[0].rollouts} == {"error"} and "600 tokens" in found[0].rollouts[0].error
    assert not found[0].rollouts[0].ids and found[1] == roll([prompt(1, 20)])[1]


def test_numbers_that_are_not_finite_are_told_and_stop_nobody():
    broken = tiny.decoder(tiny.SPECS["llama"])
    with torch.no_grad():
        broken.embed.weight[5] = torch.nan  # an id that no prompt of the family has
    found = roll([prompt(0, 20), prompt(1, 20)], n=8, engine=tiny.engine(broken), seed=2)
    ends = [each for group in found.values() for each in group.rollouts]
    assert any(each.finish == "error" and each.ids[-1] == 5 and "not finite" in each.error for each in ends)
    assert any(each.finish != "error" and 5 not in each.ids and len(each.ids) > 3 for each in ends)


def test_a_stop_string_ends_a_rollout_with_the_token_that_completed_it():
    plain = roll([prompt(2, 20)], n=8)[2].rollouts
    stop = next(f"{a} {b}" for a, b in [plain[0].text.split()[3:5]])
    cut = roll([prompt(2, 20)], n=8, params=PARAMS.with_(stop=(stop,)))[2].rollouts
    assert cut[0].finish == "stop" and cut[0].ids == plain[0].ids[:5] and cut[0].logprobs == plain[0].logprobs[:5]
    assert cut[0].text == " ".join(plain[0].text.split()[:3]) + " "
    assert [each for each in cut if stop not in each.text][1:] and cut[1:] == plain[1:]


class ByteWords:
    """The bundled model's vocabulary, whose first ids are single bytes."""

    tokenizer = Tokenizer.load(model_dir(None))
    template = None


def test_stops_in_a_byte_vocabulary_are_found_where_a_reader_of_the_whole_text_finds_them():
    words, long = ByteWords(), PARAMS.with_(max_tokens=60, ignore_eos=True)
    plain = roll([prompt(3, 20)], n=12, params=long, words=words)[3].rollouts
    texts = [each.text for each in plain]
    stops = (*(text[at : at + 2] for at, text in enumerate(texts[:4], 3)), texts[4][9:12], "é", "zzzz")
    for more in ({}, {"include_stop_str_in_output": True}, {"min_tokens": 20}):
        params = long.with_(stop=stops, **more)
        ended = 0
        for old, new in zip(plain, roll([prompt(3, 20)], n=12, params=params, words=words)[3].rollouts, strict=True):
            reader = TextStream(
                words.tokenizer, stop=stops, include_stop=bool(more.get("include_stop_str_in_output")),
                min_tokens=more.get("min_tokens", 0),
            )  # fmt: skip
            reader.push(old.ids)
            reader.finish()
            assert new.text == reader.text and new.ids == old.ids[: reader.tokens]
            assert new.finish == ("length" if reader.stopped is None else "stop")
            ended += reader.stopped is not None
        assert ended > 1


# ---------------------------------------------------------------------------------------- turns
END_SOON = SamplingParams(temperature=0.9, max_tokens=30, logit_bias={END: 4.0})
"""Most turns end by themselves."""


def test_what_a_tool_says_is_there_and_is_not_the_models():
    def tool(asked, messages):
        assert asked.number == 4 and messages[-1]["role"] == "assistant"
        return "99 98 97" if len(messages) < 4 else None

    engine = tiny.engine(LLAMA)
    found = roll([prompt(4, 40)], n=6, params=END_SOON, engine=engine, turn=tool)[4].rollouts
    many = [each for each in found if each.mine.count(False) == 6]
    assert len(many) > 2
    for each in many:
        said = [(token, logprob) for token, logprob, mine in zip(each.ids, each.logprobs, each.mine) if not mine]
        assert said == [(token, 0.0) for token in (99, 98, 97, 99, 98, 97)]
        assert each.text.count("99 98 97") == 2 and len(each.versions) == len(each.ids)
    assert engine.stats().prefix_hits > 5 * 32 + 2 * len(many) * 32, "later turns find their beginning in the cache"
    assert roll([prompt(4, 40)], n=6, params=END_SOON, turn=tool)[4].rollouts == found


def test_tools_run_while_others_generate():
    """One sample's tool waits until another sample has been finished by the engine."""
    done = threading.Event()

    def tool(asked, messages):
        if asked.number == 0:
            assert done.wait(20.0)

    groups = rollout(tiny.engine(LLAMA), [prompt(0, 9), prompt(1, 9)], 1, END_SOON, seed=1, words=WORDS, turn=tool)
    assert next(groups).prompt.number == 1
    done.set()
    assert next(groups).prompt.number == 0


def test_turns_and_length_have_limits():
    def tool(_, messages):
        return (50, 51)

    for each in roll([prompt(1, 30)], n=6, params=END_SOON, turn=tool, max_turns=3)[1].rollouts:
        assert each.finish == "length" and each.mine.count(False) <= 4
    short = roll([prompt(1, 30)], n=6, params=END_SOON, turn=tool, max_total=9)[1].rollouts
    assert {each.finish for each in short} == {"length"} and max(len(each.ids) for each in short) == 9
    full = tiny.engine(LLAMA, max_model_len=60)
    for each in roll([prompt(1, 30)], n=6, params=END_SOON, engine=full, turn=tool, max_turns=99)[1].rollouts:
        assert each.finish == "length" and 25 < len(each.ids) <= 30


def test_in_a_chat_a_reply_is_a_message_of_the_template():
    words = BareWords(chat=True)
    shown = [{"role": "user", "content": "55"}]
    asked = prompt(6, 3, shown=shown)

    def tool(_, messages):
        return {"role": "user", "content": "61"} if len(messages) > 1 else "60 <end>"

    found = roll([asked], n=6, params=END_SOON, words=words, turn=tool, max_turns=3)[6].rollouts
    replies = [[t for t, mine in zip(each.ids, each.mine) if not mine] for each in found]
    broken = len(words.tokenizer.encode("<end>"))
    first, second = [OPEN, 3, 60, *[0] * broken, END, OPEN, 2], [OPEN, 1, 61, END, OPEN, 2]
    assert first + second in replies, "a special token that a tool spells is plain text, here unknown words"
    for each in found:
        if False in each.mine:
            assert each.ids[each.mine.index(False) - 1] == END, "the model's own end of turn, once"


def test_a_turn_without_an_end_is_given_one():
    words = BareWords(chat=True)
    plain = roll([prompt(6, 3)], n=1, params=PARAMS, words=words)[6].rollouts[0]
    stop = PARAMS.with_(stop=(f" {plain.ids[4]} ",), max_tokens=8)
    asked = prompt(6, 3, shown=[{"role": "user", "content": "55"}])
    told = roll([asked], n=1, params=stop, words=words, turn=lambda *_: "60", max_turns=2)[6].rollouts[0]
    at = told.mine.index(False)
    assert told.ids[at : at + 7] == (END, OPEN, 3, 60, END, OPEN, 2)


def test_a_message_needs_a_template():
    with pytest.raises(RequestError, match="template"):
        roll([prompt(1, 9)], n=4, params=END_SOON, turn=lambda *_: {"role": "user", "content": "9"})


# ---------------------------------------------------------------------------------------- versions
def test_every_token_has_the_version_of_the_weights_that_made_it():
    engine = tiny.engine(tiny.decoder(tiny.SPECS["llama"]), max_num_seqs=2)
    found = []
    groups = rollout(engine, [prompt(i, 20) for i in range(6)], 1, END_SOON, seed=3, words=WORDS)
    for version, group in enumerate(groups, 1):
        found.append(group.rollouts[0])
        with torch.no_grad():
            engine.decoder.embed.weight.mul_(1.01)
        engine.load_weights(None, version)
    assert all(list(each.versions) == sorted(each.versions) for each in found)
    assert any(len(set(each.versions)) > 1 for each in found), "running requests went on with new weights"
    assert found[0].versions[0] == 0 and found[-1].versions[-1] == 5


# ---------------------------------------------------------------------------------------- misuse
def test_two_that_drive_one_engine_are_told():
    engine = tiny.engine(LLAMA)

    def thief():
        yield prompt(0, 9)
        while engine.has_work:
            engine.step()

    with pytest.raises(StateError, match="one rollout at a time"):
        list(rollout(engine, thief(), 1, PARAMS, seed=1, words=WORDS))


def test_no_samples_are_refused():
    with pytest.raises(ConfigError, match="from 1"):
        rollout(tiny.engine(LLAMA), [], 0, PARAMS, seed=0, words=WORDS)
