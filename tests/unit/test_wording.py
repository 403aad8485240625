"""Rows as ids: the prompt is what a rollout begins with, and what of the completion is learned."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.unit import templates
from tests.unit import toy_tokenizers as toys
from twofold.core import ConfigError, RequestError
from twofold.data import ChatTemplate, Limits, Tokenizer, Wording, prepare, read_judged, read_preferences, read_prompts
from twofold.data.examples import Counts
from twofold.data.wording import Example

USER, ANSWER = {"role": "user", "content": "hello"}, {"role": "assistant", "content": "world"}
THINKS = {"role": "assistant", "content": "<think>a</think>\nb"}
TOOL = {"type": "function", "function": {"name": "now<|im_end|>", "parameters": {}}}
OPENED = ChatTemplate(templates.CHATML[: -len("'}}{% endif %}") - 1] + "\\n<think>\\n'}}{% endif %}")
"""Its generation prompt opens a thought that no answer of the data has."""


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    backend = toys.byte_level()
    backend.add_special_tokens(templates.SPECIAL)
    folder = tmp_path_factory.mktemp("wording")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 0]}))
    return toys.save(backend, folder, eos_token="<|im_end|>")


def read(tokenizer: Tokenizer, example: Example) -> tuple[str, str, str]:
    """The prompt, the completion, and what of it is learned, as text."""
    ids = example.completion
    learned = [i for i, learn in zip(ids, example.learn, strict=True) if learn]
    prompt, completion, told = (
        tokenizer.decode(ids, skip_special_tokens=False) for ids in (example.prompt, ids, learned)
    )
    return prompt, completion, told


def test_text_goes_on(tokenizer: Tokenizer) -> None:
    wording = Wording(tokenizer)
    example = wording.example("hello ", "world")
    assert read(tokenizer, example) == ("hello ", "world<|endoftext|>", "world<|endoftext|>")
    assert example.prompt == wording.prompt("hello ") == tokenizer.encode("hello ")
    joined = wording.example("hel", "lo")
    assert tokenizer.encode("hello") != joined.prompt + joined.completion[:-1]
    assert joined.prompt == tokenizer.encode("hel") and joined.completion[:-1] == tokenizer.encode("lo")


def test_no_space_between_prompt_and_completion(tmp_path: Path) -> None:
    sentencepiece = toys.save(toys.sentencepiece_like(), tmp_path, eos_token="</s>")
    example = Wording(sentencepiece).example("hello,", "lo")
    assert sentencepiece.decode(example.prompt + example.completion[:-1]) == "hello,lo"


@pytest.mark.parametrize("source", [templates.CHATML, templates.GENERATION, templates.THINKING])
def test_messages_go_through_the_template(tokenizer: Tokenizer, source: str) -> None:
    template = ChatTemplate(source)
    wording = Wording(tokenizer, template)
    asked = (USER, ANSWER, USER)
    example = wording.example(asked, (ANSWER, USER, ANSWER))
    assert example.prompt == template.encode(tokenizer, asked) == wording.prompt(asked)
    prompt, completion, learned = read(tokenizer, example)
    assert learned == "world<|im_end|>" * 2 and completion.startswith("world<|im_end|>\n<|im_start|>user")
    assert example.learn[-1] and completion.endswith("world<|im_end|>")
    whole = template.render([*asked, ANSWER, USER, ANSWER], add_generation_prompt=False)
    assert whole == prompt + completion + "\n"
    spoken = Wording(tokenizer, template, chat=True)
    assert spoken.example("hello", "world") == wording.example((USER,), (ANSWER,))
    assert spoken.prompt("hello") == wording.prompt((USER,))


def test_an_open_answer_is_gone_on_with(tokenizer: Tokenizer) -> None:
    ids = Wording(tokenizer, ChatTemplate(templates.CHATML)).prompt((USER, {"role": "assistant", "content": "Sure, "}))
    assert tokenizer.decode(ids, skip_special_tokens=False).endswith("<|im_start|>assistant\nSure, ")


def test_a_template_that_rewrites_turns_teaches_the_last(tokenizer: Tokenizer) -> None:
    wording = Wording(tokenizer, ChatTemplate(templates.THINKING))
    example = wording.example((USER, THINKS, USER), (THINKS,))
    assert read(tokenizer, example)[2] == "<think>a</think>\nb<|im_end|>"
    assert tokenizer.decode(example.prompt).count("<think>") == 0


def test_a_generation_prompt_that_no_answer_begins_with(tokenizer: Tokenizer) -> None:
    with pytest.raises(RequestError, match="generation prompt is not how"):
        Wording(tokenizer, OPENED).example((USER,), (ANSWER,))
    marked = ChatTemplate(
        templates.GENERATION.replace("assistant\\n' }}{% endif", "assistant\\n<think>\\n' }}{% endif")
    )
    prompt, completion, learned = read(tokenizer, Wording(tokenizer, marked).example((USER, ANSWER, USER), (ANSWER,)))
    assert prompt.endswith("<|im_start|>assistant\n") and completion == learned == "world<|im_end|>"


def test_an_answer_that_begins_with_a_newline_keeps_the_prompt(tokenizer: Tokenizer) -> None:
    wording = Wording(tokenizer, ChatTemplate(templates.CHATML))
    example = wording.example((USER,), ({"role": "assistant", "content": "\nworld"},))
    assert example.prompt == wording.prompt((USER,))
    assert read(tokenizer, example)[2] == "\nworld<|im_end|>"


def test_tools_are_in_the_prompt_and_cannot_forge(tokenizer: Tokenizer) -> None:
    template = ChatTemplate(templates.LLAMA3, special={"bos_token": "<s>"})
    wording = Wording(tokenizer, template)
    example = wording.example((USER,), (ANSWER,), (TOOL,))
    assert example.prompt == template.encode(tokenizer, [USER], tools=[TOOL]) == wording.prompt((USER,), (TOOL,))
    assert "now<|im_end|>" in tokenizer.decode(example.prompt, skip_special_tokens=False)
    assert tokenizer.id_of("<|im_end|>") not in example.prompt
    ids, learn = template.encode_training(tokenizer, [USER, ANSWER], tools=[TOOL])
    assert ids == example.prompt + example.completion and learn == [False] * len(example.prompt) + example.learn
    assert tokenizer.id_of("<|im_end|>") not in ids


def test_messages_need_a_template_and_an_answer(tokenizer: Tokenizer) -> None:
    with pytest.raises(ConfigError, match="chat template"):
        Wording(tokenizer).prompt((USER,))
    with pytest.raises(ConfigError, match="chat template"):
        Wording(tokenizer, chat=True)
    with pytest.raises(RequestError, match="a completion needs a message with role 'assistant'"):
        Wording(tokenizer, ChatTemplate(templates.CHATML)).example((USER,), (USER,))


@pytest.mark.parametrize(
    ("limits", "kept"),
    [
        (Limits(seq_len=9), ([1, 2, 3, 4], [5, 6, 7])),
        (Limits(seq_len=6), ([1, 2, 3, 4], [5, 6])),
        (Limits(seq_len=6, max_prompt=3), ([2, 3, 4], [5, 6, 7])),
        (Limits(max_completion=2), ([1, 2, 3, 4], [5, 6])),
        (Limits(max_prompt=1, max_completion=1), ([4], [5])),
        (Limits(seq_len=4), None),
        (Limits(seq_len=6, too_long="drop"), None),
        (Limits(max_prompt=3, too_long="drop"), None),
        (Limits(seq_len=7, too_long="drop"), ([1, 2, 3, 4], [5, 6, 7])),
    ],
)
def test_limits(limits: Limits, kept: tuple[list[int], list[int]] | None) -> None:
    counts = Counts()
    short, long = Example([1], [2], [True]), Example([1, 2, 3, 4], [5, 6, 7], [True] * 3)
    found = limits.all([short, long], counts)
    assert [(e.prompt, e.completion) for e in found] == ([([1], [2]), kept] if kept else [])
    assert (counts.rows, counts.dropped) == (1, kept is None)
    if kept:
        assert (counts.cut_prompts, counts.cut_completions) == (len(kept[0]) < 4, len(kept[1]) < 3)
    assert all(len(e.prompt) + len(e.completion) <= limits.seq_len for e in found)


def test_nothing_to_learn_is_dropped() -> None:
    counts = Counts()
    assert Limits().all([Example([1], [2, 3], [False, False])], counts) == []
    assert Limits().all([Example([], [2], [True])], counts) == []  # nobody predicts the first id
    assert Limits(max_completion=1).all([Example([1], [2, 3], [False, True])], counts) == []
    assert str(counts) == "3 rows, 3 dropped, 0 prompts cut, 0 completions cut"
    with pytest.raises(ConfigError, match="max_prompt must be 1 or more"):
        Limits(max_prompt=0)


def test_sources_become_examples(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"question {n} ", "chosen": "good", "rejected": "bad " * n, "margin": n} for n in range(1, 41)]
    path.write_text("\n".join(map(json.dumps, rows)))
    wording, limits = Wording(tokenizer), Limits(seq_len=60)
    both = read_preferences([str(path)], wording, limits, valid_fraction=0.3)
    train, valid = both.train, both.valid
    assert train.counts.rows + valid.counts.rows == 40 and 4 < valid.counts.rows < 20
    assert len(train) == 2 * (train.counts.rows - train.counts.dropped) and train.counts.cut_completions > 0
    start, answer, end = train.corpus.starts[0], train.answers[0], train.corpus.starts[1]
    assert tokenizer.decode(train.corpus.ids[answer:end]) == "good"
    assert not train.corpus.learn[start:answer].any() and train.corpus.learn[answer:end].all()
    assert (
        train.values[0]
        == train.values[1]
        == float(tokenizer.decode(train.corpus.ids[start:answer])[len("question ") :])
    )
    twice = read_preferences([str(path)] * 2, wording, limits, valid_fraction=0.3)
    assert len(twice.train) == 2 * len(train) and len(twice.valid) == len(valid)
    assert twice.fingerprint != both.fingerprint
    assert both.fingerprint == read_preferences([str(path)], wording, limits, valid_fraction=0.3).fingerprint
    labels = read_judged([str(path)], wording, limits).train
    assert len(labels) == 80 and labels.values.tolist() == [1.0, 0.0] * 40


def test_what_a_template_refuses_is_named(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = tmp_path / "rows.jsonl"
    bad: list[dict[str, Any]] = [{"role": "nobody", "content": "x"}]
    path.write_text(json.dumps({"prompt": bad, "chosen": [ANSWER], "rejected": [THINKS]}))
    template = ChatTemplate(templates.CHATML)
    with pytest.raises(ConfigError, match=r"line 1: .*nobody"):
        read_preferences([str(path)], Wording(tokenizer, template), Limits())
    path.write_text(json.dumps({"prompt": bad}))
    with pytest.raises(ConfigError, match=r"line 1: .*nobody"):
        read_prompts([str(path)], Wording(tokenizer, template), Limits())
    path.write_text(json.dumps({"messages": [USER]}))
    with pytest.raises(ConfigError, match=r"line 1: .*assistant"):
        prepare([str(path)], tokenizer, tmp_path / "cache", template=template)


def test_completions_of_messages_are_learned_alone(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"prompt": [USER, ANSWER, USER], "completion": [ANSWER]}))
    corpus = prepare([str(path)], tokenizer, tmp_path / "cache", template=ChatTemplate(templates.CHATML)).train
    assert tokenizer.decode(corpus.ids[corpus.learn == 1], skip_special_tokens=False) == "world<|im_end|>"
    path.write_text(json.dumps({"prompt": "hello", "completion": "world"}))
    template = ChatTemplate(templates.CHATML)
    plain = prepare([str(path)], tokenizer, tmp_path / "cache", template=template).train
    spoken = prepare([str(path)], tokenizer, tmp_path / "cache", template=template, chat=True).train
    assert tokenizer.decode(plain.ids, skip_special_tokens=False) == "helloworld<|endoftext|>"
    assert tokenizer.decode(spoken.ids, skip_special_tokens=False).endswith("assistant\nworld<|im_end|>")


def test_prompts(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": "hello " * (n % 5 + 1), "answer": n}) for n in range(20)))
    wording = Wording(tokenizer)
    found = read_prompts([str(path)], wording, Limits(max_prompt=3), valid_fraction=0.2)
    train, valid = found.train, found.valid
    assert len(train) + len(valid) == 20 and train.counts.cut_prompts > 0
    for prompt in train:
        assert prompt.columns == {"answer": prompt.number}
        assert isinstance(prompt.shown, str)
        assert list(prompt.ids) == wording.prompt(prompt.shown)[-3:]
    assert train[-1] == train[len(train) - 1] and train[:2] == [train[0], train[1]]
    dropped = read_prompts([str(path)], wording, Limits(max_prompt=3, too_long="drop")).train
    assert 0 < dropped.counts.dropped == 20 - len(dropped)
    assert read_prompts([str(path)], wording, Limits(), valid_fraction=0.2).fingerprint != found.fingerprint
    path.write_text("\n".join(json.dumps({"prompt": "hello " * (n % 5 + 1), "answer": -n}) for n in range(20)))
    assert read_prompts([str(path)], wording, Limits(max_prompt=3), valid_fraction=0.2).fingerprint != found.fingerprint
