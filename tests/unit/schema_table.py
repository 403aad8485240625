"""The table of schemas: which are enforced, which are refused and for what; `python -m tests.unit.schema_table` writes
it into docs/structured.md.

Each line of schemas.jsonl is a schema with instances that it allows and that it does not, in the manner of the JSON
Schema Test Suite.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from tests.unit.toy_tokenizers import byte_level, save
from twofold.core import RequestError
from twofold.engine.grammar.matchers import Matchers
from twofold.engine.grammar.vocabulary import Vocabulary
from twofold.engine.structured import StructuredOutputs

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "structured.md"
BEGIN, END = "<!-- the table of schemas -->", "<!-- end of the table -->"


@dataclass(frozen=True)
class Case:
    keyword: str
    schema: dict[str, Any]
    valid: list[Any]
    invalid: list[Any]

    def form(self, **how: Any) -> StructuredOutputs:
        return StructuredOutputs(json=self.schema, **how)


def cases() -> list[Case]:
    lines = Path(__file__).with_name("schemas.jsonl").read_text(encoding="utf-8").splitlines()
    return [Case(**json.loads(line)) for line in lines]


class Verdict(NamedTuple):
    """Why a schema is refused; else which forbidden texts it takes, and which values it cannot write."""

    refusal: str | None
    taken: list[str]
    lost: list[Any]


class Reader:
    """Which texts a form's grammar takes whole."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer = save(byte_level(), folder, eos_token="<|im_end|>")
        self.matchers = Matchers(Vocabulary(folder, self.tokenizer.vocab_size, self.tokenizer.eos_ids))
        self._verdicts: list[Verdict] = []

    def takes(self, form: StructuredOutputs, text: str) -> bool:
        matcher = self.matchers.matcher(form)
        return bool(matcher.consume_tokens(self.tokenizer.encode(text)) and matcher.is_accepting())

    def refusal(self, form: StructuredOutputs) -> str | None:
        try:
            self.matchers.matcher(form)
        except RequestError as error:
            return str(error)
        return None

    def verdicts(self) -> list[Verdict]:
        """One for each case, found once."""
        self._verdicts = self._verdicts or [self._judge(case) for case in cases()]
        return self._verdicts

    def _judge(self, case: Case) -> Verdict:
        form = case.form()
        if (why := self.refusal(form)) is not None:
            return Verdict(why, [], [])
        taken = [text for value in case.invalid for text in spellings(value) if self.takes(form, text)]
        return Verdict(None, taken, [v for v in case.valid if not any(self.takes(form, t) for t in spellings(v))])


def spellings(value: Any) -> Iterator[str]:
    """A value as JSON may be written."""
    for escaped in (False, True):
        for separators in ((",", ":"), (", ", ": ")):
            yield json.dumps(value, ensure_ascii=escaped, separators=separators)
        yield json.dumps(value, ensure_ascii=escaped, indent=2)
    yield re.sub(r"(?<=[{ ,])\"([a-z])", lambda found: f'"\\u{ord(found[1]):04x}', json.dumps(value))


def table(reader: Reader) -> str:
    """The part of the page that is made: refused schemas by keyword, and the counts."""
    refused: dict[str, list[str]] = {}
    enforced: Counter[str] = Counter()
    taken = rejected = instances = 0
    for case, verdict in zip(cases(), reader.verdicts()):
        if verdict.refusal is not None:
            refused.setdefault(case.keyword, []).append(verdict.refusal)
            continue
        enforced[case.keyword] += 1
        instances += len(case.invalid)
        taken += len(verdict.taken)
        rejected += len(verdict.lost)
    lines = [
        f"{len(cases())} schemas: {sum(enforced.values())} are enforced, {sum(map(len, refused.values()))} refused. Of "
        f"{instances} instances that the enforced ones forbid, {taken} are accepted; {rejected} valid ones cannot be "
        "written (properties come in the schema's order).",
        "",
        "| keyword | enforced | refused | the first refusal |",
        "|---|---|---|---|",
    ]
    for keyword in sorted({*refused}, key=str.lower):
        words = refused[keyword][0].split(" cannot be ", 1)[1].split(": ", 1)[1]
        first = " ".join(words.split("; with strict")[0].split()).replace("|", "\\|")
        lines.append(f"| `{keyword}` | {enforced[keyword]} | {len(refused[keyword])} | {first} |")
    whole = sorted((name for name in enforced if name not in refused), key=str.lower)
    return "\n".join([*lines, "", "Enforced in every schema of the table: " + ", ".join(whole) + "."])


def written() -> str:
    return PAGE.read_text(encoding="utf-8").split(BEGIN)[1].split(END)[0].strip()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        made = table(Reader(Path(folder)))
    head, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
    PAGE.write_text(f"{head}{BEGIN}\n{made}\n{END}{rest.split(END)[1]}", encoding="utf-8")
