"""Texts: prompts and chats to ids in the front process, big ones off the event loop.

The tokenizer lets go of the interpreter while it works, so a 400 KB prompt in a thread stops nobody.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, TypeVar

from ..core import CheckpointError, RequestError
from ..data import ChatTemplate, Tokenizer
from ..data.speech import Manner
from ..data.tokenizer import end_ids
from .config import ServeConfig
from .hearing import Hearing, check
from .tools import Tools

T = TypeVar("T")

TAIL = 64  # tokens of a prompt's end in which a template opens a thought

INLINE = 2000  # characters that are quicker done here than in another thread


class Texts:
    """A model's tokenizer and chat template, `template` None for a model that has none.

    Without a tokenizer only ids are served: whoever asks for text gets an error that says so.
    """

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        template: ChatTemplate | None,
        manner: Manner | None = None,
        *,
        eos_ids: tuple[int, ...] = (),
    ) -> None:
        self._tokenizer = tokenizer
        self.eos_ids = eos_ids if tokenizer is None else tokenizer.eos_ids
        self.template = template
        self.manner = manner or Manner()
        self._pool = ThreadPoolExecutor(2, thread_name_prefix="tokenize")
        if tokenizer is not None:
            tokenizer.encode("")  # makes what its first text needs, while the model loads and nobody waits for it

    @property
    def tokenizer(self) -> Tokenizer:
        """Raises RequestError when there is none."""
        if self._tokenizer is None:
            raise RequestError(
                "this server has no tokenizer (skip_tokenizer_init): send token ids to /inference/v1/generate"
            )
        return self._tokenizer

    @classmethod
    def load(cls, config: ServeConfig) -> Texts:
        """Read both from the model's folder; the operator's own template wins.

        Raises:
            CheckpointError: no tokenizer, or a template that cannot be read.
            ConfigError: nobody knows how calls or reasoning are to be read.
        """
        if config.skip_tokenizer_init:
            return cls(None, None, eos_ids=end_ids(config.model))
        tokenizer = Tokenizer.load(config.model)
        template: ChatTemplate | None = None
        try:
            template = ChatTemplate.load(config.model)
        except CheckpointError:
            if _has_template(config):  # it is there and damaged
                raise
        if config.chat_template is not None:
            try:
                source = config.chat_template.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise CheckpointError(f"the chat template {config.chat_template} cannot be read: {error}") from None
            template = replace(template, source=source, named={}) if template else ChatTemplate(source)
        manner = Manner.of(
            template.sources if template else (),
            tokenizer.added_tokens,
            calls=config.tool_call_parser,
            thoughts=config.reasoning_parser,
        )
        return cls(tokenizer, template, manner)

    async def prompts(self, prompts: Sequence[str | list[int]], *, special: bool) -> list[list[int]]:
        """Ids of raw prompts; `special` adds what the checkpoint's post-processor adds (BOS, mostly)."""

        def ids(prompt: str | list[int]) -> list[int]:
            if not isinstance(prompt, str):
                return prompt
            return self.tokenizer.encode_prompt(prompt) if special else self.tokenizer.encode(prompt, special=True)

        size = sum(len(prompt) for prompt in prompts if isinstance(prompt, str))
        return await self.off_loop(size, lambda: [ids(prompt) for prompt in prompts])

    async def read(
        self, texts: Sequence[str | list[int] | tuple[str, str]], *, most: int | None = None, special: bool = True
    ) -> list[tuple[list[int], list[int]]]:
        """Ids and token types of texts that are read whole, and of pairs read as one, cut to `most` tokens each.

        Special tokens that a text spells are plain text; ids are taken as they are.
        """

        def ids(text: str | list[int] | tuple[str, str]) -> tuple[list[int], list[int]]:
            if isinstance(text, list):
                return text[:most], []
            if isinstance(text, tuple):
                return self.tokenizer.encode_text(*text, most=most)
            if special:
                return self.tokenizer.encode_text(text, most=most)
            return self.tokenizer.encode(text)[:most], []

        size = sum(sum(map(len, text)) if isinstance(text, tuple) else len(text) for text in texts)
        return await self.off_loop(size, lambda: [ids(text) for text in texts])

    async def chat(
        self,
        messages: Sequence[dict[str, Any]],
        *,
        add_generation_prompt: bool | None,
        continue_final_message: bool | None,
        settings: dict[str, Any] | None,
        tools: Tools | None = None,
        effort: str | None = None,
    ) -> list[int]:
        """Ids of a chat as the template renders it.

        Raises:
            RequestError: there is no template, or it refused the messages or a setting.
        """
        template, tokenizer = self.template, self.tokenizer
        shown = tools.given if tools else ()
        check(self.manner, tools or Tools(), takes_tools=template is not None and template.names("tools"))
        if template is None:
            raise RequestError(
                "this model has no chat template: use /v1/completions, or start the server with --chat-template FILE"
            )
        given: dict[str, Any] = {
            "add_generation_prompt": not continue_final_message if add_generation_prompt is None
            else add_generation_prompt,
            "continue_final_message": bool(continue_final_message),
        }  # fmt: skip
        for name in settings or {}:
            if name in given or name in ("tools", "documents", "messages", "tokenizer"):
                raise RequestError(f"{name} is not a setting of the template", f"chat_template_kwargs.{name}")
        settings = _effort(template, effort) | (settings or {})
        if shown:
            given["tools"] = list(shown)
        size = sum(len(message["content"]) for message in messages) + 100 * len(messages) + 400 * len(shown)

        def ids() -> list[int]:
            return template.encode(tokenizer, template.fitted(messages, tools=bool(shown)), **given, **settings)

        return await self.off_loop(size, ids)

    def hearing(self, tools: Tools, prompt: Sequence[int], *, continued: str | None, silent: bool) -> Hearing | None:
        """How the answers to a chat are listened to; None where there is nothing to tell apart."""
        if self.manner.thoughts is None and not tools:
            return None
        end = self.tokenizer.decode(prompt[-TAIL:], skip_special_tokens=False)
        return Hearing(manner=self.manner, tools=tools, start=self.manner.start(end, continued), silent=silent)

    async def off_loop(self, size: int, work: Callable[[], T]) -> T:
        """Run `work` here when its input is small, in a thread when it is not."""
        if size <= INLINE:
            return work()
        return await asyncio.get_running_loop().run_in_executor(self._pool, work)


def _effort(template: ChatTemplate, effort: str | None) -> dict[str, Any]:
    """`reasoning_effort` as the template takes it: as it is, or as whether to think at all.

    Raises:
        RequestError: it takes neither.
    """
    if effort is None:
        return {}
    if template.names("reasoning_effort"):
        return {"reasoning_effort": effort}
    switch = next((name for name in ("enable_thinking", "thinking") if template.names(name)), None)
    if switch is not None:
        return {switch: effort != "none"}
    if effort == "none":
        return {}
    raise RequestError("this model's chat template knows no effort of reasoning: leave it out", "reasoning_effort")


def _has_template(config: ServeConfig) -> bool:
    settings = config.model / "tokenizer_config.json"
    inside = settings.is_file() and '"chat_template"' in settings.read_text(encoding="utf-8", errors="replace")
    return inside or any((config.model / f"chat_template.{kind}").is_file() for kind in ("jinja", "json"))
