"""The library's documentation strings turned into questions and answers: the source "python-docs".

"python-docs-common" is its first tier alone.

tier 1   builtins and the modules that everybody meets    every wording, never held out
tier 2   other well-known modules                         some wordings, never held out
tier 3   the rest                                         one wording, held out by name: validation asks about
                                                          functions that training never described
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TypeVar

from .dataset import SOURCES, Chat, Document
from .stdlib import Entry, entries

T = TypeVar("T")

WHAT: tuple[str, ...] = (
    *("What does {n} do?", "What does {n}() do?", "what does {n} do", "What is {n}?", "What is {n} for?"),
    *("Explain {n}.", "Tell me about {n}.", "Describe {n}().", "How does {n} work?", "What does the {n} {k} do?"),
    *("Explain the {n} {k}.", "What happens when I call {n}()?", "When would I use {n}?", "Can you explain {n}()?"),
    *("What is the purpose of {n}?", "Can you tell me what {n} does?", "help({n})", "What's {n}?", "{n}?"),
    *("Remind me what {n} does.", "What is the {n} {k} for?", "What does {n} do in Python?", "explain {n}()"),
)
ARGUMENTS: tuple[str, ...] = (
    *("What are the arguments of {n}?", "What arguments does {n} take?", "What is the signature of {n}?"),
    *("How do I call {n}?", "Which parameters does {n}() take?"),
)
METHOD: tuple[str, ...] = (
    *("What does the {m} method of {o} do?", "What does {o}'s {m} method do?", "How do I use {m} on a {o}?"),
    *("What does .{m}() do on a {o}?", "What does the {o} method {m} do?"),
)
WISH: tuple[str, ...] = ("How do I {w}?", "How can I {w} in Python?", "Which function can {w}?", "I want to {w}.")
MODULE: tuple[str, ...] = (
    "What is the {n} module for?",
    "What does the {n} module do?",
    "What is {n}?",
    "Tell me about the {n} module.",
)

_FIRST = {
    *("builtins", "str", "list", "dict", "set", "tuple", "os.path", "json", "math", "random", "re", "itertools"),
    *("functools", "collections", "collections.Counter", "collections.deque", "collections.defaultdict"),
}
_SECOND = {
    *("os", "sys", "time", "datetime", "shutil", "glob", "copy", "string", "textwrap", "statistics", "pathlib"),
    *("subprocess", "heapq", "bisect", "operator", "csv", "argparse", "logging", "threading", "tempfile", "hashlib"),
    *("contextlib", "dataclasses", "enum", "typing", "urllib.parse", "secrets", "fractions", "int", "float", "bytes"),
    *("pprint", "inspect", "fnmatch", "struct", "zipfile", "base64", "uuid", "decimal", "pathlib.Path"),
    *("datetime.datetime", "datetime.date", "collections.OrderedDict", "argparse.ArgumentParser"),
}
_SPOKEN: tuple[str, ...] = (
    "append",
    "extend",
    "insert",
    "pop",
    "sort",
    "split",
    "join",
    "strip",
    "replace",
    "startswith",
    "endswith",
)
_SPOKEN += ("upper", "lower", "format", "keys", "values", "items", "get", "setdefault", "update", "add", "discard")
_ANSWER_LIMIT = 110  # characters of a signature that is worth showing

# Where a documentation string says too little, or says it of something else.
_PLAINLY = {
    "dict": "Create a new dictionary, which maps keys to values.",
    "list": "Create a new list: a mutable sequence, from the items of an iterable.",
    "tuple": "Create a new tuple: an immutable sequence, from the items of an iterable.",
    "set": "Create a new set: an unordered collection of unique elements.",
    "str": "Create a string from an object, as print would show it.",
    "int": "Convert a number or string to an integer.",
    "float": "Convert a string or number to a floating point number.",
    "bool": "Return True when its argument is true and False otherwise.",
    "enumerate": "Return an iterator of pairs: a count (from 0 on) and an item of the iterable.",
    "zip": "Combine iterables item by item: it returns an iterator of tuples, and stops at the shortest iterable.",
    "map": "Apply a function to every item of an iterable and return an iterator of the results.",
    "range": "Return a sequence of integers from start (inclusive) to stop (exclusive) by step.",
    "dir": "Return a sorted list of the names of an object's attributes, or of the names in the current scope.",
    "super": "Return a proxy object that gives access to the methods of a parent class.",
    "type": "Return the type of an object.",
    "property": "Turn a method into an attribute that is computed when it is read.",
    "min": "Return the smallest item of an iterable, or the smallest of its arguments.",
    "max": "Return the largest item of an iterable, or the largest of its arguments.",
    "open": "Open a file and return a stream to read from or write to. It raises OSError upon failure.",
    "reversed": "Return an iterator over the items of a sequence in reverse order.",
    "list.sort": "Sort the list in place, in ascending order, and return None.",
    "list.reverse": "Reverse the list in place.",
    "list.append": "Add an object to the end of the list.",
    "str.join": "Concatenate any number of strings, with the string it is called on between them.",
    "str.strip": "Return a copy of the string with leading and trailing whitespace removed.",
    "math.factorial": "Return the factorial of a number.",
    "math.gcd": "Return the greatest common divisor of its arguments.",
    "math.lcm": "Return the least common multiple of its arguments.",
    "math.hypot": "Return the Euclidean distance from the origin to a point.",
    "itertools.product": "Return the Cartesian product of its iterables, as nested loops would.",
    "itertools.chain": "Return an iterator over the items of the first iterable, then of the next, until all are done.",
    "itertools.repeat": "Return an object over and over again, as many times as told or endlessly.",
    "functools.partial": "Return a new function with some arguments of another one already filled in.",
    "functools.lru_cache": "Remember the results of a function's most recent calls; it is a decorator.",
    "collections.defaultdict": "A dictionary that calls a factory to make the value of a missing key.",
    "collections.Counter": "A dictionary that counts hashable items: items are its keys, counts are its values.",
    "json.dumps": "Serialize an object to a JSON formatted string.",
    "json.loads": "Deserialize a string that contains a JSON document to a Python object.",
    "json.dump": "Serialize an object as JSON to a file object.",
    "json.load": "Deserialize a JSON document from a file object to a Python object.",
    "random.random": "Return a random float x with 0.0 <= x < 1.0.",
    "random.uniform": "Return a random float between a and b.",
    "random.sample": "Choose k unique random elements from a population.",
    "random.shuffle": "Shuffle a list in place and return None.",
    "os.path.join": "Join two or more pathname components, inserting '/' as needed.",
    "os.getcwd": "Return the current working directory as a string.",
    "time.sleep": "Delay execution for a given number of seconds.",
}
_PLAIN_SIGNATURES = {
    "os.path.join": "(path, *paths)",
    "range": "(start, stop, step)",
    "json.dumps": "(obj, indent=None)",
}


@SOURCES.register("python-docs")
def python_docs() -> Iterator[Document]:
    """A chat of one question and one answer for each wording of each entry, by name; then longer chats of tier 1."""
    known: list[tuple[str, list[tuple[str, str]]]] = []
    for entry in _told_plainly():
        tier = tier_of(entry.name)
        pairs = list(dict.fromkeys(_pairs(entry, tier))) if tier else []
        for pair in pairs:
            yield _chat(entry.name, [pair], always_train=tier < 3)
        if tier == 1 and pairs:
            known.append((entry.name, pairs))
    for name, pairs in known:
        others = [_pick(known, f"{name} {turn}")[1] for turn in range(2)]
        turns = [_pick(other, f"{name} wording") for other in others]
        yield _chat(name, [*turns, _pick(pairs, f"{name} last")], always_train=True)
        yield _chat(name, [_pick(pairs, f"{name} system")], system="You are a helpful assistant.", always_train=True)


@SOURCES.register("python-docs-common")
def common_docs() -> Iterator[Document]:
    """Tier 1's functions alone: what a small model is to know by heart."""
    for entry in _told_plainly():
        if tier_of(entry.name) == 1 and entry.kind != "module":
            for pair in dict.fromkeys(_pairs(entry, 1)):
                yield _chat(entry.name, [pair], always_train=True)


def _chat(name: str, turns: Sequence[tuple[str, str]], *, always_train: bool, system: str = "") -> Document:
    messages = [{"role": "system", "content": system}] if system else []
    for question, answer in turns:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return Document(Chat(tuple(messages)), key=f"python-docs {name}", always_train=always_train)


def _pick(choices: Sequence[T], key: str) -> T:
    return choices[int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") % len(choices)]


def tier_of(name: str) -> int:
    """How well known a name is: 1, 2 or 3; 0 for what is too deep inside to be asked about."""
    owner = name.rpartition(".")[0] or "builtins"
    if owner in _FIRST or (owner == "builtins" and name in _FIRST):
        return 1
    if name in _SECOND or owner in _SECOND:
        return 2
    return 3 if name.count(".") <= 2 else 0


def _told_plainly() -> list[Entry]:
    found = []
    for entry in entries():
        if (
            "." not in entry.name
            and entry.kind in ("function", "class")
            and entry.name in ("copyright", "credits", "license")
        ):
            continue
        text = _PLAINLY.get(entry.name, entry.summary)
        found.append(replace(entry, summary=text, signature=_PLAIN_SIGNATURES.get(entry.name, entry.signature)))
    missing = sorted(set(_PLAINLY) - {entry.name for entry in found})
    known = [Entry(name, "function", "", _PLAINLY[name]) for name in missing]
    return sorted([*found, *known], key=lambda entry: entry.name)


def _pairs(entry: Entry, tier: int) -> Iterator[tuple[str, str]]:
    answer = describe(entry)
    if entry.kind == "module":
        for wording in _some(MODULE, entry.name, 4 if tier < 3 else 1):
            yield wording.format(n=entry.name), answer
        return
    words = {"n": entry.name, "k": entry.kind}
    for wording in _some(WHAT, entry.name, {1: len(WHAT), 2: 5, 3: 1}[tier]):
        yield wording.format(**words), answer
    if tier == 3:
        return
    if 2 < len(entry.signature) <= _ANSWER_LIMIT:
        told = f"{entry.name}{entry.signature} {_third_person(entry.summary)}"
        for wording in _some(ARGUMENTS, entry.name, {1: 5, 2: 1}[tier]):
            yield wording.format(**words), told
    owner, _, name = entry.name.rpartition(".")
    if entry.kind == "method" and owner in _FIRST:
        for wording in METHOD:
            yield wording.format(m=name, o=owner), answer
        if name in _SPOKEN and owner in ("str", "list", "dict", "set"):
            yield f"What does {name} do?", answer
            yield f"What does the {name} method do?", answer
    wish = _wish(entry.summary)
    if wish and tier == 1 and entry.kind != "class":
        for wording in WISH:
            yield wording.format(w=wish), f"Use {entry.name}: it {_third_person(entry.summary)}"


def describe(entry: Entry) -> str:
    """An entry as one answer: "len returns the number of items in a container."."""
    told = _third_person(entry.summary)
    if entry.kind == "module":
        return (
            f"The {entry.name} module: {entry.summary}" if told == entry.summary else f"The {entry.name} module {told}"
        )
    return f"{entry.name}: {entry.summary}" if told == entry.summary else f"{entry.name} {told}"


_VERB = re.compile(
    r"^(Return|Convert|Create|Make|Remove|Append|Insert|Add|Sort|Reverse|Split|Join|Find|Get|Set|Test|"
    r"Check|Compute|Calculate|Choose|Shuffle|Generate|Raise|Read|Write|Open|Close|Copy|Move|Delete|"
    r"Change|Call|Apply|Build|Compile|Concatenate|Partition|Replace|Pad|Update|Extend|Print|Format|"
    r"Serialize|Deserialize|Scan|Escape|Clear|Shift|Rotate|Report|Evaluate|Execute|Determine|Combine|"
    r"Define|Provide|Import|Parse|Turn|Remember|Delay|Decode|Encode|Load|Dump|Wrap|Fill|Give|List|Count|"
    r"Push|Pop|Yield|Rename|Normalize|Encrypt|Expand|Iterate|Search|Start|Stop|Wait|Send|Receive|Run|"
    r"Construct|Truncate|Round|Register|Drop|Try|Merge|Initialize|Assign|Choose|Look|Use|Show)\b(?!')"
)


def _third_person(text: str) -> str:
    """ "Return the length." becomes "returns the length."; what starts with no known verb stays."""
    match = _VERB.match(text)
    if not match:
        plural = re.match(r"^(Returns|Sets|Gets|Prints|Deletes|Chooses|Converts|Creates|Checks)\b", text)
        return text[0].lower() + text[1:] if plural else text
    verb, rest = match[1].lower(), text[match.end() :]
    if verb.endswith("y") and verb[-2] not in "aeiou":
        verb = verb[:-1] + "ies"
    else:
        verb += "es" if verb.endswith(("s", "sh", "ch", "x", "z")) else "s"
    return verb + re.sub(r"^([^.]*) and return ", r"\1 and returns ", rest)


def _wish(text: str) -> str:
    """The first sentence as something one may want to do, "" when it is not one: "split a string"."""
    sentence = re.split(r"(?<=[.;:])\s", text)[0].rstrip(".;:")
    if not _VERB.match(sentence) or len(sentence) > 90 or "(" in sentence:
        return ""
    plain = sentence[0].lower() + sentence[1:]
    return re.sub(r"^return ", "get ", plain) if not plain.startswith("return a copy") else plain


def _some(wordings: Sequence[str], name: str, count: int) -> list[str]:
    """`count` of the wordings, chosen by a hash of the name, in their own order."""
    ranked = sorted(wordings, key=lambda wording: hashlib.sha256(f"{name} {wording}".encode()).digest())
    return [wording for wording in wordings if wording in ranked[:count]]
