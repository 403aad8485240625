"""Wording: how rows become ids, for whoever learns from them and for rollouts alike.

    messages, text with `chat`    through the chat template, each answer up to its end of turn
    text                          what the tokenizer puts before a prompt │ prompt │ completion │ end of text

A prompt's ids are those that a rollout begins with, and no token reaches over the border to its completion.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..core import ConfigError
from .dataset import Chat, Completion, Document, Text
from .rows import Message, Said
from .tokenizer import Tokenizer

if TYPE_CHECKING:
    from .chat import ChatTemplate


@dataclass(frozen=True)
class Example:
    """Ids of a prompt, ids of one completion, and which of the completion's are learned."""

    prompt: list[int]
    completion: list[int]
    learn: list[bool]

    def whole(self) -> tuple[list[int], list[bool]]:
        """Both as one sequence, and which of its ids are learned."""
        return [*self.prompt, *self.completion], [False] * len(self.prompt) + self.learn


class Wording:
    """How rows become ids: a tokenizer, its chat template for messages, and whether text is what a user says.

    Raises:
        ConfigError: `chat` without a template.
    """

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate | None = None, *, chat: bool = False) -> None:
        if chat and template is None:
            raise _no_template()
        self._tokenizer, self._template, self._chat = tokenizer, template, chat
        bos = tokenizer.bos_id
        self._start = [bos] if bos is not None and tokenizer.encode_prompt("")[:1] == [bos] else []
        self._end = [tokenizer.end_of_text] if tokenizer.end_of_text is not None else []

    def prompt(self, asked: Said, tools: Sequence[Mapping[str, Any]] = ()) -> list[int]:
        """What a rollout begins with. Messages that end with the assistant's leave that one open to go on with.

        Raises:
            ConfigError: messages without a template.
            RequestError: the template refuses them.
        """
        if isinstance(asked, str) and not self._chat:
            return [*self._start, *self._tokenizer.encode(asked)]
        messages = _spoken(asked, "user")
        if self._template is None:
            raise _no_template()
        going_on = messages[-1]["role"] in ("assistant", "model")
        return self._template.encode(
            self._tokenizer,
            messages,
            tools=list(tools) or None,
            add_generation_prompt=not going_on,
            continue_final_message=going_on,
        )

    def example(self, asked: Said, completion: Said, tools: Sequence[Mapping[str, Any]] = ()) -> Example:
        """A prompt and a completion. Of messages, every one of the assistant's in the completion is learned.

        Raises:
            ConfigError: messages without a template.
            RequestError: the template refuses them.
        """
        if isinstance(asked, str) and isinstance(completion, str) and not self._chat:
            answer = [*self._behind(asked, completion), *self._end]
            return Example(self.prompt(asked), answer, [True] * len(answer))
        if self._template is None:
            raise _no_template()
        question, answers = _spoken(asked, "user"), _spoken(completion, "assistant")
        return Example(*self._template.encode_answer(self._tokenizer, question, answers, tools=list(tools) or None))

    def document(self, document: Document, source: str = "the source") -> tuple[list[int], list[bool]]:
        """Ids of a document that language is learned from, and for each whether it is learned.

        Raises:
            ConfigError: it is no text, or its template refuses it; the error says where it stands.
        """
        if not isinstance(document.content, Text | Completion | Chat):
            kind = type(document.content).__name__.lower()
            raise ConfigError(f"{document.where or source} holds {kind}: text, messages or completions are needed")
        with document.named(source):
            return self._whole(document.content)

    def _whole(self, content: Text | Completion | Chat) -> tuple[list[int], list[bool]]:
        match content:
            case Text(text):
                ids = [*self._start, *self._tokenizer.encode(text), *self._end]
                return ids, [True] * len(ids)
            case Completion(prompt, completion):
                return self.example(prompt, completion).whole()
            case Chat(messages, tools, asked) if asked:
                return self.example(messages[:asked], messages[asked:], tools).whole()
            case Chat(messages, tools):
                if self._template is None:
                    raise _no_template()
                return self._template.encode_training(self._tokenizer, messages, tools=list(tools) or None)

    def _behind(self, asked: str, completion: str) -> list[int]:
        """Ids of a completion as they stand behind the prompt's, which stay as they are.

        A vocabulary that puts a space before every text would put one between the two; read at once they have none.
        """
        before = self._tokenizer.encode(asked)
        both = self._tokenizer.encode(asked + completion)
        return both[len(before) :] if both[: len(before)] == before else self._tokenizer.encode(completion)


def _spoken(said: Said, role: str) -> tuple[Message, ...]:
    return ({"role": role, "content": said},) if isinstance(said, str) else said


def _no_template() -> ConfigError:
    return ConfigError(
        "messages need a chat template: the tokenizer's folder has none, put a chat_template.jinja there"
    )
