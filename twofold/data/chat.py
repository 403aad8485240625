"""ChatTemplate: messages to the prompt that a checkpoint was trained on, with no way to forge its special tokens.

What a user writes of those is hidden while the template runs (`guard.py`); what of a chat is learned says `answers.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..core import CheckpointError, RequestError, unknown
from . import answers, called
from .guard import Guard, random_digits
from .rows import Message
from .sandbox import RenderLimits, compile_template, render_template
from .tokenizer import Tokenizer
from .vocabulary import read_json

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
        tag = random_digits() if continue_final_message else ""
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
        probe = random_digits()
        messages = [{"role": "user", "content": [{"type": "text", "text": probe}]}]
        try:
            text = render_template(compile_template(source), {**self.special, "messages": messages}, self.limits)
        except RequestError:
            return False
        return probe in text and "'text'" not in text and '"text"' not in text

    def fitted(self, messages: Sequence[Message], *, tools: bool = False) -> list[Message]:
        """Messages of a client with calls in the way in which this template reads them (`called.py`)."""
        return called.fitted(self, messages, tools=tools)

    @property
    def sources(self) -> list[str]:
        """All of its variants."""
        return [self.source, *self.named.values()]

    def names(self, word: str) -> bool:
        """Whether a variant speaks of `word`: a setting that none names would be without effect."""
        return any(word in source for source in self.sources)

    # ------------------------------------------------------------------------------------------- ids
    def encode(self, tokenizer: Tokenizer, messages: Sequence[Message], **given: Any) -> list[int]:
        """The prompt's ids; takes what `render` takes. No special id comes from what stands in the messages."""
        guard = Guard(tokenizer)
        try:
            hidden = {name: guard.hide(value) for name, value in given.items()}
            shown = guard.hide_messages(messages)
        except RecursionError:
            raise RequestError("the messages or tools are nested too deeply: send flatter ones", "messages") from None
        return guard.encode([self.render(shown, **hidden)])[0]

    def encode_training(
        self, tokenizer: Tokenizer, messages: Sequence[Message], **given: Any
    ) -> tuple[list[int], list[bool]]:
        """Ids of a whole chat, and for each whether the model is to learn it (`answers.py`); takes what `render` takes.

        Raises:
            RequestError: no message is the assistant's, or the template hides where its last one starts.
        """
        return answers.whole_chat(self, tokenizer, messages, given)

    def encode_answer(
        self, tokenizer: Tokenizer, question: Sequence[Message], completion: Sequence[Message], **given: Any
    ) -> tuple[list[int], list[int], list[bool]]:
        """Ids of a prompt as `encode` makes them, ids of what follows it, and which of those are learned.

        Raises:
            RequestError: nothing of the completion is the assistant's, or the template hides where it starts.
        """
        return answers.after_prompt(self, tokenizer, question, completion, given)

    def marked(self, messages: Sequence[Message], given: Mapping[str, Any]) -> list[str]:
        """A chat's text cut where its `{% generation %}` blocks begin and end: every second piece is inside of one."""
        mark = random_digits()
        return self._render(messages, {"add_generation_prompt": False, **given}, mark=mark).split(mark)


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
