"""Speech: how a model is spoken to; what `rollout` needs beside an engine, and the prompts that it takes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..data import ChatTemplate, Tokenizer
from ..data.prompts import asked
from ..data.rows import Said, plain
from ..data.wording import Wording
from .episode import Prompt


@dataclass(frozen=True)
class Speech:
    """A model's tokenizer and, where it chats, its template: the `Words` of a rollout."""

    tokenizer: Tokenizer
    template: ChatTemplate | None = None

    @classmethod
    def load(cls, folder: str | Path, *, chat: bool = True) -> Speech:
        """Of a model's directory. With `chat` a prompt that is text is what a user says.

        Raises:
            CheckpointError: `chat`, and the model has no template.
        """
        return cls(Tokenizer.load(Path(folder)), ChatTemplate.load(Path(folder)) if chat else None)

    def prompts(self, rows: Iterable[Said | Mapping[str, Any]]) -> list[Prompt]:
        """Numbered from 0: texts, lists of messages, or rows with a "prompt", whose other keys are columns.

        Raises:
            ValueError: a row without a prompt.
        """
        wording = Wording(self.tokenizer, self.template, chat=self.template is not None)
        found = []
        for number, row in enumerate(rows):
            content = asked(row if isinstance(row, Mapping) else {"prompt": row})
            ids = tuple(wording.prompt(content.prompt, content.tools))
            shown: Any = plain(content.prompt)
            if self.template is not None and isinstance(shown, str):
                shown = [{"role": "user", "content": shown}]
            found.append(Prompt(number=number, ids=ids, shown=shown, columns=content.columns))
        return found
