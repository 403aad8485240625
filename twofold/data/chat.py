"""ChatTemplate: messages to the prompt that a checkpoint was trained on, with no way to forge its special tokens.

What a user writes may spell "<|im_end|>". The trick:

    1  hide    in every string of the messages, each spelled special token (and each end of one that stands at the
               edge of a string, where two strings could be joined into one) becomes a random number
    2  render  the template runs on that; whatever special token stands in its output, the template wrote
    3  reveal  the numbers become the user's text again, and their places are remembered as foreign
    4  encode  special tokens become special ids outside of foreign places, plain text inside

When nothing special stands in a foreign place, which is nearly always, step 4 is one call for the whole text, and the
ids are those of transformers.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..core import CheckpointError, RequestError, unknown
from .sandbox import RenderLimits, compile_template, render_template
from .tokenizer import Tokenizer
from .vocabulary import read_json

Message = Mapping[str, Any]
Span = tuple[int, int]

ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython", "model")
TEMPLATE_SETTINGS = frozenset(
    {
        "add_vision_id",
        "builtin_tools",
        "clear_thinking",
        "date_string",
        "enable_thinking",
        "model_identity",
        "preserve_thinking",
        "reasoning_effort",
        "thinking",
        "thinking_budget",
        "tools_in_user_message",
    }
)
_SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


@dataclass(frozen=True)
class ChatTemplate:
    """A checkpoint's chat template; `named` holds its variants ("tool_use" is taken when tools are given).

    `special` are the special tokens that templates name, as in {"bos_token": "<s>"}.
    """

    source: str
    named: Mapping[str, str] = field(default_factory=dict)
    special: Mapping[str, str] = field(default_factory=dict)
    limits: RenderLimits = field(default_factory=RenderLimits)

    @classmethod
    def load(cls, folder: str | Path, *, limits: RenderLimits | None = None) -> ChatTemplate:
        """Read chat_template.jinja, or `chat_template` of chat_template.json or tokenizer_config.json.

        Raises:
            CheckpointError: the folder has no template, or one that is not jinja2.
        """
        folder = Path(folder)
        settings = read_json(folder / "special_tokens_map.json") | read_json(folder / "tokenizer_config.json")
        named = _find(folder, settings)
        if "default" not in named:
            found = f"only {', '.join(sorted(named))}" if named else "none"
            raise CheckpointError(
                f"{folder} has no default chat template ({found}): it may be a base model, which completes text and "
                "does not chat; else put a chat_template.jinja there"
            )
        for source in named.values():
            compile_template(source)
        special = {name: text for name in _SPECIAL_NAMES if (text := _text(settings.get(name)))}
        return cls(named.pop("default"), named, special, limits or RenderLimits())

    # ------------------------------------------------------------------------------------------- text
    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        **settings: Any,
    ) -> str:
        """The prompt's text, as transformers' `apply_chat_template` makes it.

        `continue_final_message` leaves the last message open, for the model to go on with. `settings` are the
        template's own switches, from `TEMPLATE_SETTINGS`.

        Raises:
            RequestError: a bad role or setting, or the template refused the messages.
        """
        for name in settings:
            if name not in TEMPLATE_SETTINGS:
                raise RequestError(unknown("template setting", name, TEMPLATE_SETTINGS), f"chat_template_kwargs.{name}")
        if continue_final_message and add_generation_prompt:
            raise RequestError(
                "continue_final_message and add_generation_prompt exclude each other: set add_generation_prompt false",
                "continue_final_message",
            )
        given = {"add_generation_prompt": add_generation_prompt, "tools": tools, "documents": documents, **settings}
        return self._render(messages, given, continue_final_message=continue_final_message)

    def _render(
        self,
        messages: Sequence[Message],
        given: Mapping[str, Any],
        *,
        continue_final_message: bool = False,
        mark: str = "",
    ) -> str:
        _check_roles(messages)
        source = self.named.get("tool_use", self.source) if given.get("tools") else self.source
        plain = [self._flat(source, dict(message)) for message in messages]
        tag = _number() if continue_final_message else ""
        if tag:
            _append_to_last(plain, tag)
        values = {**self.special, **given, "messages": plain}
        text = render_template(compile_template(source), values, self.limits, mark=mark)
        return _cut_at(text, tag) if tag else text

    def _flat(self, source: str, message: dict[str, Any]) -> dict[str, Any]:
        """Content given as parts, made one text for templates that only know text."""
        content = message.get("content")
        if not isinstance(content, list) or self._takes_parts(source):
            return message
        if any(not isinstance(part, dict) or not isinstance(part.get("text"), str) for part in content):
            raise RequestError(
                "this model reads text alone: every part must be {'type': 'text', 'text': ...}", "messages"
            )
        return {**message, "content": "\n".join(part["text"] for part in content)}

    def _takes_parts(self, source: str) -> bool:
        probe = _number()
        messages = [{"role": "user", "content": [{"type": "text", "text": probe}]}]
        try:
            text = render_template(compile_template(source), {**self.special, "messages": messages}, self.limits)
        except RequestError:
            return False
        return probe in text and "'text'" not in text and '"text"' not in text

    # ------------------------------------------------------------------------------------------- ids
    def encode(self, tokenizer: Tokenizer, messages: Sequence[Message], **given: Any) -> list[int]:
        """The prompt's ids; takes what `render` takes. No special id comes from what stands in the messages."""
        guard = _Guard(tokenizer)
        hidden = {name: guard.hide(value) for name, value in given.items()}
        text = self.render(guard.hide_messages(messages), **hidden)
        return guard.encode([text])[0]

    def encode_training(
        self, tokenizer: Tokenizer, messages: Sequence[Message], **settings: Any
    ) -> tuple[list[int], list[bool]]:
        """Ids of a whole chat, and for each whether the model is to learn it: the assistant's words and end of turn.

        A template's own `{% generation %}` blocks say what those are; else they are what the chat up to an answer
        adds to the chat up to its question with the generation prompt. When the template rewrites earlier turns (and
        so the one is not the beginning of the other), only the last answer is learned.

        Raises:
            RequestError: no message is the assistant's, or the template hides where its last one starts.
        """
        answers = [place for place, message in enumerate(messages) if message.get("role") in ("assistant", "model")]
        if not answers:
            raise RequestError("a chat to learn from needs a message with role 'assistant'", "messages")
        guard = _Guard(tokenizer)
        hidden = guard.hide_messages(messages)
        pieces = self._marked(hidden, settings) or self._between_prompts(hidden, answers, settings)
        ids, spans, borders = guard.encode_pieces(pieces)
        learned = [_to_end_of_turn(tokenizer, ids, spans, border) for border in borders[1::2]]
        mask = [any(first <= start and end <= last for first, last in learned) for start, end in spans]
        return ids, mask

    def _marked(self, messages: list[Message], settings: Mapping[str, Any]) -> list[str]:
        mark = _number()
        text = self._render(messages, {"add_generation_prompt": False, **settings}, mark=mark)
        pieces = text.split(mark)
        return pieces if len(pieces) > 1 else []

    def _between_prompts(self, messages: list[Message], answers: list[int], settings: Mapping[str, Any]) -> list[str]:
        whole = self._render(messages, {"add_generation_prompt": False, **settings})
        cuts: list[int] = []
        for place in answers:
            question = self._render(messages[:place], {"add_generation_prompt": True, **settings})
            answer = self._render(messages[: place + 1], {"add_generation_prompt": False, **settings})
            if answer.startswith(question) and whole.startswith(answer):
                cuts += [len(question), len(answer)]
            elif place != answers[-1]:
                cuts = []
            else:
                raise RequestError(
                    "this chat template's generation prompt is not how its answers begin, so what to learn is unknown: "
                    "put {% generation %} ... {% endgeneration %} around the answer in the template",
                    "messages",
                )
        return [whole[start:end] for start, end in zip([0, *cuts], [*cuts, len(whole)])]


class _Guard:
    """Hides what spells special tokens in one call's messages, and reveals it in the rendered text."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._key = _number()
        self._hidden: list[str] = []
        self._place = re.compile(self._key + r"(\d{8})")

    def hide_messages(self, messages: Sequence[Message]) -> list[Message]:
        """Messages with everything hidden but their roles, which are from a list and which templates compare."""
        return [{key: item if key == "role" else self.hide(item) for key, item in m.items()} for m in messages]

    def hide(self, value: Any) -> Any:
        """A copy of plain data with every spelled special token replaced, in keys as well."""
        if isinstance(value, str):
            return self._hide_text(value)
        if isinstance(value, Mapping):
            return {self.hide(key): self.hide(item) for key, item in value.items()}
        return [self.hide(item) for item in value] if isinstance(value, list | tuple) else value

    def _hide_text(self, text: str) -> str:
        spelled = self._tokenizer.split_special(text)
        starts, ends = self._tokenizer.special_edges
        widest = max(map(len, starts), default=0)
        first, last = (spelled[0][0], spelled[-1][1]) if spelled else (len(text), 0)
        lead = next((n for n in range(min(first, widest), 0, -1) if text[:n] in ends), 0)
        room = min(len(text) - max(last, lead), widest)
        trail = next((n for n in range(room, 0, -1) if text[-n:] in starts), 0)
        pieces, place = [], 0
        for start, end in [(0, lead), *spelled, (len(text) - trail, len(text))]:
            if start < end:
                pieces += [text[place:start], self._replace(text[start:end])]
                place = end
        return "".join([*pieces, text[place:]])

    def _replace(self, spelled: str) -> str:
        self._hidden.append(spelled)
        return f"{self._key}{len(self._hidden) - 1:08d}"

    def _reveal(self, text: str, start: int) -> tuple[str, list[Span]]:
        pieces, foreign, last = [], [], 0
        for match in self._place.finditer(text):
            pieces.append(text[last : match.start()])
            start += match.start() - last
            hidden = self._hidden[int(match[1])]
            foreign.append((start, start + len(hidden)))
            pieces.append(hidden)
            start, last = start + len(hidden), match.end()
        return "".join([*pieces, text[last:]]), foreign

    def encode(self, texts: Sequence[str]) -> tuple[list[int], list[Span]]:
        """Ids of the texts joined, and the characters of each."""
        ids, spans, _ = self.encode_pieces(texts)
        return ids, spans

    def encode_pieces(self, texts: Sequence[str]) -> tuple[list[int], list[Span], list[Span]]:
        """Ids of the texts joined, the characters of each id, and the characters of each text."""
        whole, foreign, borders = "", list[Span](), list[Span]()
        for text in texts:
            start = len(whole)
            clear, found = self._reveal(text, start)
            whole += clear
            foreign += found
            borders.append((start, len(whole)))
        ids, spans = _encode_around(self._tokenizer, whole, foreign)
        return ids, spans, borders


def _encode_around(tokenizer: Tokenizer, text: str, foreign: list[Span]) -> tuple[list[int], list[Span]]:
    spelled = tokenizer.split_special(text)
    if not any(a < right and left < b for a, b in spelled for left, right in foreign):
        return tokenizer.encode_spans(text, special=True)
    gaps = zip([0, *(end for _, end in foreign)], [*(start for start, _ in foreign), len(text)])
    own = [(left + a, left + b) for left, right in gaps for a, b in tokenizer.split_special(text[left:right])]
    ids: list[int] = []
    spans: list[Span] = []
    for start, end in [*own, (len(text), len(text))]:
        last = spans[-1][1] if spans else 0
        found, places = tokenizer.encode_spans(text[last:start])
        ids += found
        spans += [(last + a, last + b) for a, b in places]
        if start < end:
            ids.append(tokenizer.special_tokens[text[start:end]])
            spans.append((start, end))
    return ids, spans


def _to_end_of_turn(tokenizer: Tokenizer, ids: list[int], spans: list[Span], border: Span) -> Span:
    """An answer's characters up to its last special token: what stands after it (a newline) is the template's."""
    start, end = border
    inside = [
        right
        for token, (left, right) in zip(ids, spans)
        if start <= left < right <= end and token in tokenizer.special_ids
    ]
    return (start, max(inside)) if inside else border


def _find(folder: Path, settings: Mapping[str, Any]) -> dict[str, str]:
    """Every template of a folder by name."""
    given = settings.get("chat_template") or read_json(folder / "chat_template.json").get("chat_template")
    named: dict[str, str] = {}
    if isinstance(given, str):
        named["default"] = given
    elif isinstance(given, list):
        named = {str(item["name"]): str(item["template"]) for item in given if isinstance(item, dict)}
    own = folder / "chat_template.jinja"
    if own.is_file():
        named["default"] = own.read_text(encoding="utf-8")
    for path in sorted((folder / "additional_chat_templates").glob("*.jinja")):
        named[path.stem] = path.read_text(encoding="utf-8")
    return named


def _text(token: Any) -> str | None:
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else None


def _check_roles(messages: Sequence[Message]) -> None:
    for place, message in enumerate(messages):
        role = message.get("role")
        if role not in ROLES:
            raise RequestError(unknown("role", str(role), ROLES), f"messages[{place}].role")


def _number() -> str:
    """Twenty random digits: no template trims them, changes their case or escapes them, and no user can guess them."""
    return f"{secrets.randbelow(9 * 10**19) + 10**19}"


def _append_to_last(messages: list[dict[str, Any]], tag: str) -> None:
    content = messages[-1].get("content") if messages else None
    if isinstance(content, str):
        messages[-1]["content"] = content + tag + " "
        return
    texts = [place for place, part in enumerate(content or []) if isinstance(part, dict) and "text" in part]
    if not isinstance(content, list) or not texts:
        raise RequestError("continue_final_message needs a last message with text", "continue_final_message")
    last = content[texts[-1]]
    parts = [*content[: texts[-1]], {**last, "text": last["text"] + tag + " "}, *content[texts[-1] + 1 :]]
    messages[-1]["content"] = parts


def _cut_at(text: str, tag: str) -> str:
    place = text.rfind(tag)
    if place < 0:
        raise RequestError("this chat template leaves out the last message's text: it cannot be continued", "messages")
    kept = text[:place]
    # The tag ends in a space. Where the template has trimmed it, it would have trimmed the text's own spaces as well.
    return kept if text[place + len(tag) :].startswith(" ") else kept.rstrip()
