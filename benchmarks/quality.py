"""How good is the bundled model at the two things that it is for?

    twofold bench quality [--model DIR] [--json FILE]

Answers: twenty questions about common functions, greedy, judged by words that a right answer must have; asked in
wordings that training had, and in wordings that it never saw. Completions: code prompts in the manner of the standard
library, greedy, judged by how many of their complete lines Python can parse.
"""

from __future__ import annotations

import argparse
import ast
import json
from pathlib import Path
from typing import Any

from twofold import LLM, SamplingParams
from twofold.commands.model import model_dir

# A function, and what a right answer says: one of the alternatives of every word.
QUESTIONS: dict[str, tuple[str, ...]] = {
    "len": ("number of items",),
    "sorted": ("new list", "ascending|order"),
    "abs": ("absolute value",),
    "isinstance": ("instance of a class",),
    "enumerate": ("count", "item"),
    "zip": ("tuple",),
    "sum": ("sum", "iterable|numbers"),
    "print": ("values", "stream|stdout"),
    "str.split": ("list", "separator|sep"),
    "str.join": ("concatenate", "string"),
    "str.upper": ("uppercase",),
    "list.append": ("end of the list",),
    "dict.get": ("value for key", "default"),
    "os.path.join": ("join", "path"),
    "os.path.exists": ("path exists",),
    "json.dumps": ("serialize", "json"),
    "json.loads": ("deserialize", "json"),
    "math.sqrt": ("square root",),
    "random.choice": ("random element",),
    "re.findall": ("list", "non-overlapping matches"),
}
KNOWN_WORDING = "What does {n} do?"
NEW_WORDING = "In one sentence, what does {n}() do?"

PROMPTS = (
    "def read_json(path):\n",
    "def read_lines(path):\n    with open(path) as f:\n",
    "import os\nimport sys\n\ndef main():\n",
    "class Stack:\n    def __init__(self):\n",
    "class Point:\n    def __init__(self, x, y):\n",
    "def is_empty(self):\n",
    "def factorial(n):\n",
    "def parse_args(args):\n    parser = argparse.ArgumentParser(",
    "    def close(self):\n",
    "    def __repr__(self):\n        return ",
    "    def __len__(self):\n",
    "    def __iter__(self):\n        for ",
    "def walk(top):\n    for name in os.listdir(top):\n",
    "def copy(src, dst):\n    ",
    "try:\n    import ",
    "def escape(s):\n    s = s.replace(",
    "class Error(Exception):\n",
    "def get(self, key, default=None):\n    try:\n",
    "if __name__ == '__main__':\n",
    "def _check(value):\n    if not isinstance(value, ",
)


def right(name: str, answer: str) -> bool:
    """Whether an answer, the name that it starts with left out, has one of the alternatives of every word."""
    told = answer.removeprefix(name).lower()
    return all(any(choice in told for choice in word.split("|")) for word in QUESTIONS[name])


def lines_that_parse(prompt: str, completion: str) -> tuple[int, int]:
    """Of the complete lines that a completion adds or ends, how many Python can parse with what stands before them, and
    all. A line that it cannot, even with up to seven more after it, is left out, and the next one has its turn.

    An indented prompt is put into a class, as it would stand in one.
    """
    lines = (prompt + completion).split("\n")[:-1]
    given = prompt.count("\n")
    kept = ["class _:"] * prompt.startswith(" ") + lines[:given]
    place, good = given, 0
    while place < len(lines):
        size = next((n for n in range(1, 9) if parses([*kept, *lines[place : place + n]])), 0)
        size = min(size, len(lines) - place)
        kept += lines[place : place + size]
        good, place = good + size, place + max(size, 1)
    return good, len(lines) - given


def parses(lines: list[str]) -> bool:
    """Whether these lines are Python, a block that has just been opened being closed with `pass`."""
    last = next((line for line in reversed(lines) if line.strip()), "")
    closed = [*lines, " " * (len(last) - len(last.lstrip()) + 1) + "pass"] if last.rstrip().endswith(":") else lines
    try:
        ast.parse("\n".join(closed) + "\n")
    except (SyntaxError, ValueError):
        return False
    return True


def ask(llm: LLM, wording: str) -> dict[str, tuple[str, bool]]:
    """Every question in one wording: the answer, and whether it is right."""
    talks = [[{"role": "user", "content": wording.format(n=name)}] for name in QUESTIONS]
    answers = llm.chat(talks, SamplingParams(temperature=0.0, max_tokens=80), progress=False)
    texts = [answer.outputs[0].text for answer in answers]
    return {name: (text, right(name, text)) for name, text in zip(QUESTIONS, texts)}


def complete(llm: LLM) -> list[tuple[str, str, int, int]]:
    """Every prompt with its completion, the lines of it that parse and all of its lines."""
    done = llm.generate(PROMPTS, SamplingParams(temperature=0.0, max_tokens=96), progress=False)
    texts = [each.outputs[0].text for each in done]
    return [(prompt, text, *lines_that_parse(prompt, text)) for prompt, text in zip(PROMPTS, texts)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a checkpoint directory; the bundled model without it")
    parser.add_argument("--json", type=Path, help="write the figures there")
    args = parser.parse_args()
    llm = LLM(model_dir(args.model))
    record: dict[str, Any] = {}
    for name, wording in (("known", KNOWN_WORDING), ("new", NEW_WORDING)):
        found = ask(llm, wording)
        record[name] = sum(good for _, good in found.values())
        print(f"{record[name]:>3} of {len(found)} answers right, asked {wording!r}")
        for function, (text, good) in found.items():
            print(f"      {'right' if good else 'WRONG'}  {function}: {text!r}")
    completions = complete(llm)
    parsed, lines = sum(row[2] for row in completions), sum(row[3] for row in completions)
    whole = sum(good == total for *_, good, total in completions)
    record |= {"lines": lines, "lines_that_parse": parsed, "completions_that_parse": whole}
    print(f"{parsed} of {lines} completed lines parse; {whole} of {len(PROMPTS)} completions parse to their last line")
    for prompt, text, good, total in completions:
        print(f"      {good:>2} of {total:>2}  {prompt[-40:]!r} -> {text[:100]!r}")
    if args.json:
        args.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
