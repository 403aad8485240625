"""The library's short functions, the end of each one's last line to be filled in."""

from __future__ import annotations

import ast
from itertools import islice

import pytest

from twofold.data import documents
from twofold.data.dataset import Completion
from twofold.data.functions import HIDDEN, LONGEST, place_to_cut, short_functions

FILE = """
class Box:
    def __len__(self):
        return len(self.data)

    @property
    def full(self):
        return True

    def read(self):
        try:
            return self.data
        except KeyError:
            return None  # gone

def long():
    return [
        1,
    ]

def one(): return 1
"""


def test_short_functions_stand_alone() -> None:
    assert list(short_functions(FILE)) == [
        "def __len__(self):\n    return len(self.data)",
        "def read(self):\n    try:\n        return self.data\n    except KeyError:\n        return None  # gone",
    ]
    assert list(short_functions("def broken(:\n    return 1")) == []


@pytest.mark.parametrize("code", ["def f(self):\n    return len(self.data)", "def f():\n    return None"])
def test_the_cut_is_behind_a_token_of_the_last_line(code: str) -> None:
    cut = place_to_cut(code)
    assert cut is not None and cut == place_to_cut(code)
    assert "\n" not in code[cut:] and code[cut:].strip() and not code[:cut].endswith(" ")
    assert place_to_cut("def f():\n    return") is None
    assert place_to_cut("def f():\n    return None  # what") is None


def test_the_source_is_stable_and_whole() -> None:
    first, again = (list(islice(documents("python-functions"), 300)) for _ in range(2))
    assert first == again
    texts = set()
    for document in first:
        assert isinstance(document.content, Completion) and document.key
        prompt, completion = document.content.prompt, document.content.completion
        assert len(prompt + completion) <= LONGEST and len(completion) < 200 and HIDDEN >= 1
        ast.parse(prompt + completion)
        texts.add(prompt + completion)
    assert len(texts) == len(first)
