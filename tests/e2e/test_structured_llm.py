"""A random model that must answer in a form does, every time: greedy or sampled, drafted or not, alone or not."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jsonschema
import msgspec
import psutil
import pytest
from hostile_grammars import GRAMMARS

from tests.unit.schema_table import cases
from twofold.core import RequestError
from twofold.engine.engine import Engine
from twofold.engine.llm import LLM, Completion
from twofold.engine.proposer import Guess
from twofold.engine.request import Request
from twofold.engine.row import Row
from twofold.engine.sampling import SamplingParams
from twofold.engine.speculation import Speculation
from twofold.engine.structured import StructuredOutputs

PERSON = {
    "type": "object",
    "properties": {
        "first_name": {"type": "string", "maxLength": 8},
        "favourite_colour": {"enum": ["red and black", "green", "blue"]},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
    },
    "required": ["first_name", "favourite_colour", "age"],
    "additionalProperties": False,
}


def tight(**form: Any) -> StructuredOutputs:
    return StructuredOutputs(disable_any_whitespace=True, **form)


@pytest.fixture(scope="module")
def llm(tiny: Path) -> Iterator[LLM]:
    made = LLM(tiny, num_blocks=1024, max_num_seqs=32, max_num_batched_tokens=256)
    yield made
    assert made.engine.grammars is not None and made.engine.grammars.restarts == 0
    made.engine.grammars.close()


def answers(llm: LLM, forms: Sequence[StructuredOutputs], prompt: str = "hello", **params: Any) -> list[Completion]:
    given = {"max_tokens": 100, "seed": 3, **params}
    wanted = [SamplingParams(structured_outputs=form, **given) for form in forms]
    return llm.generate([prompt] * len(forms), wanted, progress=False)


def fits(schema: Any, text: str) -> bool:
    try:
        return bool(jsonschema.Draft202012Validator(schema).is_valid(json.loads(text)))
    except re.error:
        return True  # a pattern that is not Python's


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_every_finished_answer_fits_its_schema(llm: LLM, temperature: float) -> None:
    assert llm.engine.grammars is not None
    forms = []
    for number, case in enumerate(cases()):
        form = case.form(disable_any_whitespace=number % 2 == 0)
        try:
            llm.engine.grammars.check(form)
        except RequestError:
            continue
        forms.append((case.schema, form))
    finished = 0
    for (schema, _), answer in zip(forms, answers(llm, [form for _, form in forms], temperature=temperature)):
        (said,) = answer.outputs
        assert said.finish_reason in ("stop", "length"), (schema, said.error)
        if said.finish_reason == "stop":
            finished += 1
            assert fits(schema, said.text), (schema, said.text)
    assert finished >= 80


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_every_other_form(llm: LLM, temperature: float) -> None:
    choices = ("yes", "no", "no, never", 'été\n"quoted"')
    tag = {
        "type": "structural_tag",
        "format": {
            "type": "sequence",
            "elements": [
                {"type": "const_string", "value": "<|start|>"},
                {"type": "tag", "begin": "[", "content": {"type": "json_schema", "json_schema": {"enum": [1, 22]}},
                 "end": ["]", "<|pad|>"]},
                {"type": "or", "elements": [{"type": "regex", "pattern": "x{3}/"}, {"type": "const_string",
                                                                                     "value": "y"}]},
            ],
        },
    }  # fmt: skip
    forms = {
        StructuredOutputs(regex=r"[a-c]{5}-[0-9]{3}"): r"[a-c]{5}-[0-9]{3}",
        StructuredOutputs(regex="(?i)abc|x/y"): "(?i)abc|x/y",
        StructuredOutputs(choice=choices): "|".join(map(re.escape, choices)),
        StructuredOutputs(grammar='root ::= "a" digits ("x" | "yy")\ndigits ::= [0-9]{2,4}'): "a[0-9]{2,4}(x|yy)",
        StructuredOutputs(grammar='start: "<" WORD+ ">"\nWORD: /[p-s]{2}/'): "<([p-s]{2})+>",
        tight(structural_tag=tag): r"<\|start\|>\[(1|22)(\]|<\|pad\|>)(xxx/|y)",
    }
    for (form, pattern), answer in zip(
        forms.items(), answers(llm, list(forms), temperature=temperature, skip_special_tokens=False, max_tokens=200)
    ):
        (said,) = answer.outputs
        assert said.finish_reason == "stop", (form, said)
        assert re.fullmatch(pattern, said.text), (form, said.text)


def test_forced_tokens_take_no_pass_of_their_own(llm: LLM) -> None:
    grammars, before = llm.engine.grammars, llm.engine.stats()
    assert grammars is not None
    grammars.ahead_seconds = 1.0  # so that no answer is late, whatever this machine does besides
    try:
        (answer,) = answers(llm, [tight(json=PERSON)], temperature=1.0)
    finally:
        grammars.ahead_seconds = None
    (said,) = answer.outputs
    steps = llm.engine.stats().steps - before.steps
    assert fits(PERSON, said.text)
    letters = len(re.sub(r'\{"first_name":|,"favourite_colour":"|,"age":|\}', "", said.text))
    assert steps < len(said.token_ids) - 15 and steps <= letters + 6, (steps, len(said.token_ids), said.text)


class Parrot:
    """Guesses that a row goes on as `said`, wrongly at every fifth place."""

    costs = False

    def __init__(self, said: Sequence[tuple[int, ...]]) -> None:
        self.said = said

    def propose(self, wanted: Sequence[tuple[Row, int]]) -> dict[int, Guess]:
        out = {}
        for row, most in wanted:
            so_far = tuple(row.request.output_ids)
            told = next((ids[len(so_far) :] for ids in self.said if ids[: len(so_far)] == so_far), ())
            places = enumerate(told[:most], len(so_far))
            if drafts := tuple(token if at % 5 else (token + 1) % 400 for at, token in places):
                out[row.serial] = Guess(drafts, (0,) * len(drafts))
        return out

    def told(self, row: Row, kept: int) -> None:
        pass

    def forget(self, row: Row) -> None:
        pass

    def sleep(self) -> None:
        pass


def test_drafts_preemptions_and_company_change_no_token(llm: LLM) -> None:
    forms = [tight(json=PERSON), StructuredOutputs(json=PERSON), StructuredOutputs(regex="(ab|cd){3,9}x"),
             StructuredOutputs(json_object=True)]  # fmt: skip
    for temperature in (0.0, 1.0):
        alone = [answers(llm, [form], temperature=temperature)[0].outputs[0] for form in forms]
        scheduler = llm.engine.scheduler
        scheduler.speculation = found = Speculation(Parrot([said.token_ids for said in alone]), most=4, adaptive=False)
        try:
            together = [answer.outputs[0] for answer in answers(llm, forms * 3, temperature=temperature)]
        finally:
            scheduler.speculation = None
        assert [said.token_ids for said in together] == [said.token_ids for said in alone] * 3
        assert 0 < sum(found.accepted) < found.draft_tokens
        names = [f"r{number}" for number in range(len(forms))]
        said = preempted(llm, forms, names, temperature)
        assert [said[name] for name in names] == [list(each.token_ids) for each in alone]


def preempted(
    llm: LLM, forms: Sequence[StructuredOutputs], names: list[str], temperature: float
) -> dict[str, list[int]]:
    """The tokens of requests that are thrown out after every seventh step, and once begin anew from their tokens."""
    engine = llm.engine
    said: dict[str, list[int]] = {name: [] for name in names}
    prompt = tuple(llm.tokenizer.encode_prompt("hello"))
    params = [SamplingParams(structured_outputs=f, max_tokens=100, seed=3, temperature=temperature) for f in forms]
    for name, wanted in zip(names, params):
        engine.submit(Request(id=name, prompt_ids=prompt, params=wanted))
    steps = 0
    ended: set[str] = set()
    while engine.has_work:
        for output in engine.step():
            said[output.request_id] += [token.id for token in output.tokens]
            if output.finish is not None:
                ended.add(output.request_id)
        steps += 1
        if steps % 7 == 0:
            engine.scheduler.preempt_all()
        if steps == 9 and names[0] not in ended:
            engine.abort(names[0])
            engine.scheduler.take()
            engine.submit(Request(id=names[0], prompt_ids=prompt, params=params[0], output_ids=list(said[names[0]])))
    return said


def test_other_parameters_apply_too(llm: LLM) -> None:
    digits = StructuredOutputs(regex="[0-9]{6}")
    one = llm.tokenizer.encode("7")[0]
    (biased,) = answers(llm, [digits], logit_bias={one: 100.0}, temperature=0.0)
    assert biased.outputs[0].text == "777777"
    (allowed,) = answers(llm, [digits], allowed_token_ids=(one, *llm.tokenizer.encode("8")))
    assert re.fullmatch("[78]{6}", allowed.outputs[0].text)
    (penalised,) = answers(llm, [digits], repetition_penalty=100.0, temperature=0.0)
    assert len(set(penalised.outputs[0].text)) >= 5
    (scored,) = answers(llm, [digits], logprobs=3, logprobs_mode="processed")
    assert scored.outputs[0].logprobs is not None
    for token in scored.outputs[0].logprobs:
        assert all(llm.tokenizer.decode([name])[0].isdigit() for name, _ in token.top)
    (many,) = answers(llm, [digits], n=5)
    assert len({said.text for said in many.outputs}) > 1
    assert all(re.fullmatch("[0-9]{6}", said.text) for said in many.outputs)


@pytest.mark.parametrize(
    ("form", "params", "words"),
    [
        (StructuredOutputs(regex="[0-9]+"), {"allowed_token_ids": (70,)}, "leave none in common"),
        (StructuredOutputs(choice=("yes",)), {"min_tokens": 50}, "min_tokens is 50"),
    ],
)
def test_what_leaves_no_token_is_that_requests_error(
    llm: LLM, form: StructuredOutputs, params: Any, words: str
) -> None:
    (failed,) = answers(llm, [form], **params)
    (fine,) = answers(llm, [form])
    assert failed.outputs[0].finish_reason == "error" and words in str(failed.outputs[0].error)
    assert fine.outputs[0].finish_reason in ("stop", "length")


def test_a_form_that_cannot_be_enforced_is_refused_at_once(llm: LLM) -> None:
    with pytest.raises(RequestError, match='"not"'):
        answers(llm, [StructuredOutputs(json={"not": {}})])
    assert not llm.engine.has_work


def test_what_is_not_strict_is_checked_in_the_end(llm: LLM) -> None:
    schema = {"type": "array", "items": {"enum": [1, 2]}, "minItems": 3, "maxItems": 3, "uniqueItems": True}
    form = tight(json=schema, strict=False)
    (answer,) = answers(llm, [form], n=4, temperature=1.0)
    for said in answer.outputs:
        assert said.finish_reason == "stop" and len(json.loads(said.text)) == 3
        assert said.structured_output_error == "answer: breaks 'uniqueItems'"
    (fine,) = answers(llm, [tight(json={**schema, "maxItems": 1, "minItems": 1}, strict=False)])
    assert fine.outputs[0].structured_output_error is None


def test_a_grammar_that_hangs_is_ended_alone(tiny: Path) -> None:
    """The watchdog ends its process; the others' places are found again, and their texts are as if nothing had been."""
    llm = LLM(tiny, num_blocks=256, max_num_seqs=8, max_num_batched_tokens=256)
    grammars, engine = llm.engine.grammars, llm.engine
    assert grammars is not None and isinstance(engine, Engine)
    wanted = {"fine": tight(json=PERSON), "other": StructuredOutputs(regex="(ab|cd){40}x")}
    alone = {name: answers(llm, [form])[0].outputs[0].token_ids for name, form in wanted.items()}
    grammars.close()
    grammars.opening = msgspec.structs.replace(grammars.opening, compile_seconds=1.0)
    wanted["hangs"] = StructuredOutputs(grammar=GRAMMARS["GBNF many rules"])
    prompt = tuple(llm.tokenizer.encode_prompt("hello"))
    others = psutil.Process().children()
    for name, form in wanted.items():
        params = SamplingParams(structured_outputs=form, max_tokens=100, seed=3)
        engine.submit(Request(id=name, prompt_ids=prompt, params=params))
    said: dict[str, list[int]] = {name: [] for name in wanted}
    ends = {}
    ended = False
    while engine.has_work:
        for output in engine.step():
            said[output.request_id] += [token.id for token in output.tokens]
            if output.finish is not None:
                ends[output.request_id] = output
        if not ended and all(said[name] for name in alone):  # it ends while both are on their way
            (process,) = set(psutil.Process().children()) - set(others)
            ended = bool(psutil.wait_procs([process], timeout=30)[0])
            assert ended and not ends
    assert "too costly" in str(ends["hangs"].error) and ends["hangs"].param == "structured_outputs"
    assert grammars.restarts == 1
    assert {name: tuple(said[name]) for name in alone} == alone
    grammars.close()
