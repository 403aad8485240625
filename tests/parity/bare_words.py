"""Words of the tiny decoders, whose vocabulary means nothing: each id is spelled as a number and a space."""

from __future__ import annotations

import tokenizers
from tokenizers import models, pre_tokenizers

from twofold.align.episode import Prompt
from twofold.data import ChatTemplate, Tokenizer

END, OPEN = 7, 8
"""The ids of `<end>` and `<open>`, which are special."""

CHAT = (
    "{% for m in messages %}<open>{{ {'user': '1', 'assistant': '2', 'tool': '3'}[m['role']] }} "
    "{{ m['content'] }}<end>{% endfor %}{% if add_generation_prompt %}<open>2 {% endif %}"
)


class BareWords:
    """A tokenizer of `vocab` ids, and a template that spells roles as ids 1 to 3; `template` None is a base model's."""

    def __init__(self, vocab: int = 131, chat: bool = False) -> None:
        names = {END: "<end>", OPEN: "<open>"}
        table = {names.get(i, str(i)): i for i in range(vocab)}
        backend = tokenizers.Tokenizer(models.WordLevel(table, unk_token="0"))
        backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        backend.add_special_tokens([tokenizers.AddedToken(name, special=True) for name in names.values()])
        self.tokenizer = Tokenizer(backend.to_str(), settings={}, eos_ids=(END,), bos_id=None)
        self.template = ChatTemplate(CHAT) if chat else None


def prompt(number: int, length: int, vocab: int = 131, **more) -> Prompt:
    """Prompt `number` of a fixed family."""
    return Prompt(
        number=number, ids=tuple((number * 37 + i * i * 5 + i) % (vocab - 9) + 9 for i in range(length)), **more
    )
