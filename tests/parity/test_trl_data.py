"""Rows, masks and truncation are TRL's: its training templates, its implicit prompts, its cuts, its mismatches."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from transformers import PreTrainedTokenizerFast

from tests.unit import templates
from tests.unit import toy_tokenizers as toys
from twofold.core import RequestError
from twofold.data import (
    ChatTemplate,
    Limits,
    PairLoader,
    Tokenizer,
    UnpairedLoader,
    Wording,
    read_judged,
    read_preferences,
)
from twofold.data.preference import preference

TEMPLATES = sorted((Path(trl.__file__).parent / "chat_templates").glob("*_training.jinja"))
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
USER, SYSTEM = {"role": "user", "content": "hello world"}, {"role": "system", "content": "be brief"}
FINE, OK = {"role": "assistant", "content": "\nfine, naïve "}, {"role": "assistant", "content": "ok then"}
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": "1"}}}
TOOLS = [
    {
        "type": "function",
        "function": {"name": "f", "description": "d", "parameters": {"type": "object", "properties": {}}},
    }
]
CALLED = {"role": "assistant", "content": "", "tool_calls": [CALL]}
CHATS: list[tuple[list[dict[str, Any]], Any]] = [
    ([USER, FINE, USER, OK], None),
    ([SYSTEM, USER, FINE, USER, OK], None),
    ([USER, CALLED, {"role": "tool", "name": "f", "content": "4"}, OK], TOOLS),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    backend = toys.byte_level()
    backend.add_special_tokens(templates.SPECIAL)
    path = tmp_path_factory.mktemp("trl")
    toys.save(backend, path, **SPECIAL)
    return path


def test_templates_with_generation_blocks(folder: Path) -> None:
    """ids and masks of every template that TRL trains with, where transformers renders the chat at all."""
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), **SPECIAL)
    tokenizer, compared = Tokenizer.load(folder), 0
    for path in TEMPLATES:
        source = path.read_text(encoding="utf-8")
        ours = ChatTemplate(source, special=SPECIAL)
        for chat, tools in CHATS:
            try:
                expected = theirs.apply_chat_template(
                    chat, tools=tools, chat_template=source, return_dict=True, return_assistant_tokens_mask=True
                )
            except Exception:  # jinja's, and the template's own
                with pytest.raises(RequestError):
                    ours.encode_training(tokenizer, chat, tools=tools)
                continue
            ids, mask = ours.encode_training(tokenizer, chat, tools=tools)
            assert ids == expected["input_ids"], path.name
            assert [int(m) for m in mask] == expected["assistant_masks"], path.name
            compared += 1
    assert compared > 2 * len(TEMPLATES) > 40


def test_prompts_end_where_theirs_do(folder: Path) -> None:
    """TRL's DPO: the completion begins where the prompt alone and the answered prompt part."""
    from trl.data_utils import common_prefix_length

    theirs = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), **SPECIAL)
    tokenizer, compared = Tokenizer.load(folder), 0
    for path in TEMPLATES:
        source = path.read_text(encoding="utf-8")
        wording = Wording(tokenizer, ChatTemplate(source, special=SPECIAL))
        given = {"chat_template": source, "return_dict": False}
        try:
            asked = theirs.apply_chat_template([SYSTEM, USER], add_generation_prompt=True, **given)
            whole = theirs.apply_chat_template([SYSTEM, USER, OK], **given)
        except Exception:  # a template that takes no system prompt, or parts alone
            continue
        example = wording.example((SYSTEM, USER), (OK,))
        cut = common_prefix_length(asked, whole)
        assert example.prompt == whole[:cut], path.name
        assert example.completion == whole[cut : cut + len(example.completion)], path.name
        assert not tokenizer.decode(whole[cut + len(example.completion) :]).strip(), path.name
        compared += 1
    assert compared > 0.8 * len(TEMPLATES)


@pytest.mark.parametrize(
    "row",
    [
        {"chosen": "The sky is blue.", "rejected": "The sky is green."},
        {"chosen": "The sky is blue.", "rejected": "The skies"},
        {"chosen": [USER, OK], "rejected": [USER, FINE]},
        {"chosen": [SYSTEM, USER, FINE, USER, OK], "rejected": [SYSTEM, USER, FINE, USER, FINE]},
    ],
)
def test_implicit_prompts(row: dict[str, Any]) -> None:
    from trl import extract_prompt

    found, expected = preference(row), extract_prompt(row)
    for ours, theirs in zip((found.prompt, found.chosen, found.rejected), expected.values(), strict=True):
        assert (ours if isinstance(ours, str) else list(ours)) == theirs


def test_cut_as_their_collator_does(tmp_path: Path, folder: Path) -> None:
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    path = tmp_path / "rows.jsonl"
    rows = [{"prompt": "hello " * n, "chosen": "world " * (n + 1), "rejected": "x " * n} for n in range(1, 6)]
    path.write_text("\n".join(map(json.dumps, rows)))
    wording, most = Wording(Tokenizer.load(folder)), 14
    found = read_preferences([str(path)], wording, Limits(seq_len=most)).train
    examples = []
    for row in rows:
        ends = [wording.example(row["prompt"], row[end]) for end in ("chosen", "rejected")]
        if len(ends[0].prompt) < most:  # their trainer drops the others
            chosen, rejected = (end.completion for end in ends)
            examples.append({"prompt_ids": ends[0].prompt, "chosen_ids": chosen, "rejected_ids": rejected})
    assert found.counts.dropped == len(rows) - len(examples) and found.counts.cut_completions > 0
    theirs = DataCollatorForPreference(pad_token_id=0, max_length=most)(examples)
    batch = PairLoader(found, len(examples), shuffle=False, whole=True).batch(0)
    ids, targets = (torch.split(values, batch.lengths) for values in (batch.ids_T, batch.targets_T))
    for place in range(2 * len(examples)):
        half, pair = place % 2, place // 2
        row = half * len(examples) + pair  # theirs: all chosen, then all rejected
        kept = theirs["attention_mask"][row].bool()
        assert ids[place].tolist() == theirs["input_ids"][row][kept].tolist()
        learned = theirs["completion_mask"][row][kept].bool()[1:]
        assert (targets[place][:-1] != -100).tolist() == learned.tolist()


def test_mismatched_as_their_collator_does(tmp_path: Path, folder: Path) -> None:
    from trl.trainer.kto_trainer import DataCollatorForUnpairedPreference

    path = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"{n} hello ", "completion": "world " * n, "label": n % 2 == 0} for n in range(1, 5)]
    path.write_text("\n".join(map(json.dumps, rows)))
    wording, most = Wording(Tokenizer.load(folder)), 9
    made = [wording.example(row["prompt"], row["completion"]) for row in rows]
    loader = UnpairedLoader(read_judged([str(path)], wording, Limits(seq_len=most)).train, len(rows), shuffle=False)
    examples = [
        {
            "prompt_ids": example.prompt,
            "completion_ids": example.completion,
            "KL_completion_ids": made[place - 1].completion,
            "label": bool(rows[place]["label"]),
        }
        for place, example in enumerate(made)
    ]
    theirs = DataCollatorForUnpairedPreference(pad_token_id=0, max_length=most)(examples)
    for batch, prefix in ((loader.batch(0), ""), (loader.mismatched(0), "KL_")):
        ids, targets = (torch.split(values, batch.lengths) for values in (batch.ids_T, batch.targets_T))
        for place in range(len(rows)):
            kept = theirs[f"{prefix}attention_mask"][place].bool()
            assert ids[place].tolist() == theirs[f"{prefix}input_ids"][place][kept][:-1].tolist()
            learned = theirs[f"{prefix}completion_mask"][place][kept].bool()[1:]
            assert (targets[place] != -100).tolist() == learned.tolist()
    labels = torch.split(loader.batch(0).beside["label"], loader.batch(0).lengths)
    assert [bool(label[0]) for label in labels] == theirs["label"].bool().tolist()
