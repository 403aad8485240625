"""Rendering and encoding of typical chat templates equals transformers' `apply_chat_template`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from tests.unit import templates
from tests.unit import toy_tokenizers as toys
from twofold.data import ChatTemplate, Tokenizer

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
CHAT = [
    {"role": "user", "content": "hello world\n  how > are | you? <"},
    {"role": "assistant", "content": " <think>\nhm\n</think>\n\nfine, naïve café 🙂 "},
    {"role": "user", "content": "def f(x):\n    return x\n"},
]
SYSTEM = {"role": "system", "content": "  be brief\n"}
TOOLS = [{"type": "function", "function": {"name": "f", "description": "<b> & 'é'", "parameters": {"type": "object"}}}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    backend = toys.byte_level()
    backend.add_special_tokens(templates.SPECIAL)
    path = tmp_path_factory.mktemp("parity")
    toys.save(backend, path, **SPECIAL)
    return path


def chats(name: str) -> list[list[dict[str, str]]]:
    alone = [CHAT[:1], CHAT]
    return alone if name in ("gemma", "mistral") else [*alone, [SYSTEM, *CHAT]]


@pytest.mark.parametrize("name", templates.ALL)
def test_same_text_and_ids(name: str, folder: Path) -> None:
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), **SPECIAL)
    theirs.chat_template = templates.ALL[name]
    ours, tokenizer = ChatTemplate(templates.ALL[name], special=SPECIAL), Tokenizer.load(folder)
    for chat in chats(name):
        for ask in (True, False):
            expected = theirs.apply_chat_template(chat, tokenize=False, add_generation_prompt=ask)
            assert ours.render(chat, add_generation_prompt=ask) == expected
            ids = theirs.apply_chat_template(chat, tokenize=True, add_generation_prompt=ask, return_dict=False)
            assert ours.encode(tokenizer, chat, add_generation_prompt=ask) == ids


@pytest.mark.parametrize("name", templates.ALL)
def test_same_continuation(name: str, folder: Path) -> None:
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), **SPECIAL)
    ours = ChatTemplate(templates.ALL[name], special=SPECIAL)
    given = {"add_generation_prompt": False, "continue_final_message": True}
    for text in ("Sure, ", " it is", "x"):
        chat = [*CHAT[:1], {"role": "assistant", "content": text}]
        expected = theirs.apply_chat_template(chat, chat_template=templates.ALL[name], tokenize=False, **given)
        assert ours.render(chat, **given) == expected


def test_same_tools_and_switches(folder: Path) -> None:
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), **SPECIAL)
    for name, given in (("llama3", {"tools": TOOLS}), ("thinking", {"enable_thinking": False})):
        ours = ChatTemplate(templates.ALL[name], special=SPECIAL)
        expected = theirs.apply_chat_template(
            CHAT, chat_template=templates.ALL[name], tokenize=False, add_generation_prompt=True, **given
        )
        assert ours.render(CHAT, **given) == expected


CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": "é"}}}
CALLED: list[dict[str, Any]] = [
    CHAT[0],
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "name": "f", "content": "42"},
    {"role": "assistant", "content": "\n It is 42."},
]


@pytest.mark.parametrize("name", ["generation", "calls"])
@pytest.mark.parametrize("system", [[], [SYSTEM]])
def test_same_learned_tokens(name: str, system: list[dict[str, Any]], folder: Path) -> None:
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), **SPECIAL)
    ours, tokenizer = ChatTemplate(templates.ALL[name], special=SPECIAL), Tokenizer.load(folder)
    cases: list[tuple[list[dict[str, Any]], Any]] = [([*system, *CHAT, {"role": "assistant", "content": "\nok"}], None)]
    cases += [([*system, *CALLED], TOOLS)] if name == "calls" else []
    for chat, tools in cases:
        expected = theirs.apply_chat_template(
            chat, tools=tools, chat_template=ours.source, return_dict=True, return_assistant_tokens_mask=True
        )
        ids, mask = ours.encode_training(tokenizer, chat, tools=tools)
        assert ids == expected["input_ids"]
        assert [int(m) for m in mask] == expected["assistant_masks"] and 1 in mask


def test_increments_are_the_blocks_without_them(folder: Path) -> None:
    """Where a template marks nothing, what answers add to their questions is what its blocks would have said."""
    tokenizer = Tokenizer.load(folder)
    plain = ChatTemplate(templates.CALLS.replace("{%- generation %}", "").replace("{%- endgeneration %}", ""))
    for chat, tools in ([*CHAT, CHAT[1]], None), ([SYSTEM, *CALLED], TOOLS):
        ids, mask = plain.encode_training(tokenizer, chat, tools=tools)
        exact_ids, exact = ChatTemplate(templates.CALLS).encode_training(tokenizer, chat, tools=tools)
        learned, marked = ([i for i, m in zip(ids, flags, strict=True) if m] for flags in (mask, exact))
        assert ids == exact_ids
        told = tokenizer.decode(marked, skip_special_tokens=False).replace("<|im_end|>\n", "<|im_end|>")
        assert tokenizer.decode(learned, skip_special_tokens=False).replace("assistant\n", "") == told
