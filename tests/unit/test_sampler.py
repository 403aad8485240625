"""The sampler against a slow definition in plain Python, and each row against itself among others, bit for bit."""

import math
import random

import msgspec
import pytest
import torch

from twofold.engine.plan import Draw
from twofold.engine.request import TokenOut
from twofold.engine.sampler import sample, score, uniform
from twofold.engine.sampling import SamplingParams
from twofold.kernels import sample as kernel

V = 203


@pytest.fixture(autouse=True, params=["serving", "reference"])
def implementation(request):
    """Everything below holds for what serves here and for the definition."""
    for op in (kernel.choose, kernel.score):
        op.use("reference" if request.param == "reference" else None)
    yield
    for op in (kernel.choose, kernel.score):
        op.use(None)


def draw(position=7, *, seed=11, sample=0, banned=(), prompt=(), output=(), **params):
    return Draw(
        params=SamplingParams(**params),
        seed=seed,
        sample=sample,
        position=position,
        banned=tuple(banned),
        prompt_ids=tuple(prompt),
        output_ids=tuple(output),
    )


def slow(logits, d):
    """The documented order, one number at a time in float64."""
    p = d.params
    x = [float(value) for value in logits]
    if p.allowed_token_ids is not None:
        x = [value if i in p.allowed_token_ids else -math.inf for i, value in enumerate(x)]
    for i, value in p.logit_bias.items():
        x[i] += value
    for i in d.banned:
        x[i] = -math.inf
    if p.repetition_penalty != 1.0:
        for i in {*d.prompt_ids, *d.output_ids}:
            x[i] = x[i] / p.repetition_penalty if x[i] > 0 else x[i] * p.repetition_penalty
    for i in set(d.output_ids):
        x[i] -= d.output_ids.count(i) * p.frequency_penalty + p.presence_penalty
    if p.greedy:
        return x.index(max(x)), None
    top = max(x)
    weight = [math.exp((value - top) / p.temperature) for value in x]
    weight = [w if w >= p.min_p * max(weight) else 0.0 for w in weight]
    if p.top_k > 0:
        floor = sorted(weight, reverse=True)[min(p.top_k, len(weight)) - 1]
        weight = [w if w >= floor else 0.0 for w in weight]
    if p.top_p < 1.0:
        whole, mass = sum(weight), 0.0
        for floor in sorted(weight, reverse=True):
            mass += floor
            if mass >= p.top_p * whole:
                break
        weight = [w if w >= floor else 0.0 for w in weight]
    at, mass = uniform(d.seed, d.sample, d.position) * sum(weight), 0.0
    for i, w in enumerate(weight):
        mass += w
        if mass > at:
            return i, [w / sum(weight) for w in weight]
    raise AssertionError("no token")


def some_params(rng):
    choices = {
        "temperature": rng.choice([0.0, 0.3, 1.0, 1.7]),
        "top_k": rng.choice([0, -1, 1, 5, 40, 500]),
        "top_p": rng.choice([1.0, 0.9, 0.5, 0.05]),
        "min_p": rng.choice([0.0, 0.05, 0.5]),
        "presence_penalty": rng.choice([0.0, 1.5, -1.0]),
        "frequency_penalty": rng.choice([0.0, 0.7]),
        "repetition_penalty": rng.choice([1.0, 1.3, 0.8]),
        "logit_bias": rng.choice([{}, {3: 5.0, 7: -100.0}]),
        "allowed_token_ids": rng.choice([None, None, None, tuple(range(2, 60, 3))]),
        "logprobs": rng.choice([None, 0, 4]),
        "logprobs_mode": rng.choice(["raw", "tempered", "processed"]),
    }
    names = rng.sample(sorted(choices), rng.randint(0, 6))
    return {name: choices[name] for name in names}


def some_rows(count, seed=0, vocab=V):
    rng = random.Random(seed)
    logits = torch.randn(count, vocab, generator=torch.Generator().manual_seed(seed)) * 3
    draws = [
        draw(
            rng.randrange(500),
            seed=rng.randrange(2**64),
            sample=rng.randrange(4),
            banned=rng.choice([(), (1, 2)]),
            prompt=[rng.randrange(vocab) for _ in range(6)],
            output=[rng.randrange(vocab) for _ in range(rng.randrange(9))],
            **some_params(rng),
        )
        for _ in range(count)
    ]
    return logits, draws


def test_every_mixture_of_settings_agrees_with_the_slow_definition():
    logits, draws = some_rows(300)
    for row, token in enumerate(sample(logits, draws)):
        assert token.id == slow(logits[row].tolist(), draws[row])[0], draws[row]


@pytest.mark.parametrize("vocab", [V, 1024, 4099])
def test_a_row_has_the_same_bits_alone_and_among_others(vocab):
    logits, draws = some_rows(48, seed=3, vocab=vocab)
    together = sample(logits, draws)
    assert together == [sample(logits[i : i + 1], draws[i : i + 1])[0] for i in range(48)]
    order = list(range(48))
    random.Random(1).shuffle(order)
    assert [together[i] for i in order] == sample(logits[order], [draws[i] for i in order])


def test_draws_follow_the_distribution():
    logits = torch.tensor([[1.0, 0.0, -1.0, 2.0]])
    count = 4000
    tokens = sample(logits.expand(count, -1), [draw(i) for i in range(count)])
    seen = torch.bincount(torch.tensor([t.id for t in tokens]), minlength=4) / count
    assert torch.allclose(seen, torch.softmax(logits[0], -1), atol=0.03)


def test_u_depends_on_its_keys_alone():
    values = {uniform(seed, k, position) for seed in range(8) for k in range(4) for position in range(8)}
    assert len(values) == 256 and all(0 <= u < 1 for u in values)
    assert abs(sum(values) / 256 - 0.5) < 0.06
    assert uniform(2**64 - 1, 0, 0) == uniform(-1, 0, 0)


def test_greedy_takes_the_lowest_of_equals():
    logits = torch.zeros(1, V)
    logits[0, [9, 50, 100]] = 4.0
    assert sample(logits, [draw(temperature=0.0)])[0].id == 9


def test_ties_at_a_cut_are_all_kept():
    logits = torch.tensor([[3.0, 2.0, 2.0, 2.0, 0.0]])
    seen = {sample(logits, [draw(i, top_k=2)])[0].id for i in range(200)}
    assert seen == {0, 1, 2, 3}
    seen = {sample(logits, [draw(i, top_p=0.7)])[0].id for i in range(200)}
    assert seen == {0, 1, 2, 3}


def test_raw_logprobs_are_those_of_the_model():
    logits, _ = some_rows(1)
    (token,) = sample(logits, [draw(temperature=0.7, top_k=3, logprobs=5, seed=4)])
    truth = torch.log_softmax(logits[0].double(), -1)
    assert token.logprob == pytest.approx(truth[token.id].item(), abs=2e-6)
    assert token.rank == int((truth > truth[token.id]).sum()) + 1
    values, ids = truth.topk(5)
    assert [other for other, _ in token.top] == ids.tolist()
    assert [value for _, value in token.top] == pytest.approx(values.tolist(), abs=2e-6)


def test_processed_logprobs_are_those_drawn_from():
    logits, _ = some_rows(1)
    d = draw(temperature=0.7, top_k=3, logprobs=5, logprobs_mode="processed")
    (token,) = sample(logits, [d])
    _, weight = slow(logits[0].tolist(), d)
    assert len(token.top) == 3, "tokens that were cut are no alternatives"
    assert sum(math.exp(value) for _, value in token.top) == pytest.approx(1.0, abs=1e-5)
    for other, value in token.top:
        assert value == pytest.approx(math.log(weight[other]), abs=1e-4)
    greedy = draw(temperature=0.0, logprobs=0, logprobs_mode="processed", logit_bias={5: 50.0})
    (token,) = sample(logits, [greedy])
    assert token.id == 5 and token.logprob == pytest.approx(0.0, abs=1e-4) and token.top == ()


def test_a_beam_is_told_edited_logprobs_as_they_are():
    """As transformers' processors edit them: after the softmax, and nothing is normalised again."""
    logits, given = torch.randn(1, V, generator=torch.Generator().manual_seed(2)) * 2, {"logit_bias": {3: 2.0}}
    plain = draw(temperature=0.0, banned=(9,), output=(5, 6), repetition_penalty=1.5, presence_penalty=0.5, **given)
    (found,) = sample(logits, [msgspec.structs.replace(plain, beams=6)])
    x = torch.log_softmax(logits[0].double(), -1)
    x[3] += 2.0
    x[9] = -math.inf
    x[[5, 6]] = x[[5, 6]] * 1.5 - 0.5
    values, ids = x.topk(6)
    assert [token for token, _ in found.top] == ids.tolist() and found.id == found.top[0][0]
    assert [value for _, value in found.top] == pytest.approx(values.tolist(), abs=1e-5)
    assert found.logprob == found.top[0][1] and found.rank == 1


def test_logprobs_are_given_only_when_asked():
    logits, _ = some_rows(2)
    plain, asked = sample(logits, [draw(), draw(logprobs=0)])
    assert plain == TokenOut(plain.id) and asked.logprob is not None and asked.top == ()


def test_targets_are_scored():
    logits, _ = some_rows(3)
    truth = torch.log_softmax(logits.double(), -1)
    scored = score(logits, [5, 6, 7], 2)
    assert [t.logprob for t in scored] == pytest.approx([truth[i, 5 + i].item() for i in range(3)], abs=2e-6)
    assert all(len(t.top) == 2 for t in scored)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_row_that_is_not_finite_fails_alone(value):
    logits, draws = some_rows(6, seed=9)
    clean = sample(logits, draws)
    logits[2, 17] = value
    broken = sample(logits, draws)
    assert "not finite" in broken[2]
    assert broken[:2] + broken[3:] == clean[:2] + clean[3:]


def test_nothing_left_to_choose_is_an_error():
    logits, _ = some_rows(1)
    (said,) = sample(logits, [draw(allowed_token_ids=(4,), banned=(4,))])
    assert "min_tokens" in said


def test_the_last_token_can_be_drawn_and_weightless_ones_never():
    logits = torch.full((1, 5), -200.0)
    logits[0, 2] = 0.0
    assert {sample(logits, [draw(i)])[0].id for i in range(50)} == {2}
    assert {sample(torch.zeros(1, 3), [draw(i)])[0].id for i in range(100)} == {0, 1, 2}
