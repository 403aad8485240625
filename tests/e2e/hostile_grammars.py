"""Forms that mean harm, by name: each is a request's field that says what the answer must look like."""

from __future__ import annotations

from typing import Any


def nested(depth: int, inner: Any, word: str = "properties") -> Any:
    for _ in range(depth):
        inner = {"type": "object", "properties": {"a": inner}} if word == "properties" else {word: [inner]}
    return inner


def json_forms() -> dict[str, Any]:
    keys = {f"k{n}": {"type": "string", "pattern": f"^(x{n}|y+z){{2,9}}$"} for n in range(700)}
    return {
        "sixty deep": nested(30, {"type": "integer"}),
        "four hundred deep": nested(400, {}),
        "anyOf in anyOf": nested(25, {"type": "null"}, "anyOf"),
        "enum of texts": {"enum": [f"v{n}" for n in range(6000)]},
        "enum of numbers": {"enum": list(range(9000))},
        "enum too long": {"enum": list(range(10_001))},
        "a cycle of references": {
            "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}},
            "$ref": "#/$defs/a",
        },
        "itself": {"$ref": "#"},
        "itself in allOf": {"allOf": [{"$ref": "#"}, {"type": "integer"}]},
        "no way out": {"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]},
        "remote": {"$ref": "http://127.0.0.1:1/schema.json"},
        "a file": {"$ref": "file:///etc/passwd"},
        "no text as reference": {"$ref": 5},
        "a relative reference": {"$id": "http://x/", "$ref": "../../y.json"},
        "dynamic": {"$dynamicRef": "#x"},
        "a pattern a key": {"type": "object", "properties": keys, "required": list(keys)},
        "exponential": {"type": "string", "pattern": "^(a+)+$"},
        "counts of counts": {"type": "string", "pattern": "^((a{1,100}){1,100}){1,100}$"},
        "look-ahead": {"type": "string", "pattern": "^(?=a)b"},
        "letters": {"type": "string", "pattern": "^\\p{L}{1,900}$"},
        "a long text": {"type": "string", "minLength": 10**9},
        "a longer text": {"type": "string", "minLength": 5, "maxLength": 10**18},
        "a long list": {"type": "array", "minItems": 10**9},
        "a longer list": {"type": "array", "items": {"type": "integer"}, "maxItems": 10**12},
        "tiny steps": {"type": "number", "multipleOf": 1e-300},
        "a large bound": {"type": "integer", "minimum": 10**400},
        "a larger bound": {"type": "number", "minimum": 1e308, "maximum": 1.7e308},
        "oneOf": {"oneOf": [{"type": "object", "properties": {f"a{n}": {}}} for n in range(500)]},
        "anyOf": {"anyOf": [{"type": "object", "required": [f"a{n}"]} for n in range(1500)]},
        "allOf": {"allOf": [{"type": "object", "properties": {f"a{n}": {"minimum": n}}} for n in range(300)]},
        "not": {"not": {"not": {"not": {}}}},
        "a NUL": {"type": "object", "properties": {"\0": {}}, "required": ["\0"]},
        "a number": 7,
        "a list": [],
        "false": False,
        "broken": "{",
        "an unknown type": {"type": "thing"},
        "a list of properties": {"properties": [1, 2]},
        "a text as required": {"type": "object", "required": "abc"},
        "its own settings": {"type": "object", "x-guidance": {"lenient": True}, "not": {}},
        "overlapping patterns": {
            "type": "object",
            "patternProperties": {"a": {"type": "null"}, "b": {"type": "array"}},
        },
        "too large": {"type": "string", "description": "x" * 70_000},
        "words": {"type": "object", "properties": {"é" * 4000: {}, "\u202e": {}}},
    }


REGEXES = {
    "overlap": "(a|aa)+b",
    "open": "(((",
    "a million": "a{1000000}",
    "a billion": "((a{1000}){1000}){1000}",
    "far": ".{0,30000}x",
    "long": "a" * 60_000,
    "too long": "a" * 70_000,
    "an empty class": "[]",
    "NUL": "a\0b",
    "a reference back": "(?P<x>a)(?P=x)",
    "words": "|".join(f"word{n}" for n in range(5000)),
    "beyond Unicode": "\\x{110000}",
    "nothing at all": "[^\\x{0}-\\x{10FFFF}]",
    "a suffix": "(.|\n)*(a|b)(.|\n){0,300}",
}

GRAMMARS = {
    "left recursion": 'start: start "a" | "a"',
    "nothing for ever": 'start: ""*',
    "an unknown rule": "start: nobody",
    "ambiguous": 'start: start start | "a" | ""',
    "in a circle": "start: a\na: b\nb: a",
    "many": 'start: "a"{1000000}',
    "many of many": "start: a{1000}\na: b{1000}\nb: c{1000}\nc: /x/",
    "bad JSON": "start: %json {",
    "import": "%import common.WORD\nstart: WORD",
    "an unknown token": "start: <|nobody|>",
    "a token beyond": "start: <[99999999]>",
    "rubbish": "\x01\x02 ::: %%% |||",
    "parentheses": "start: " + "(" * 3000 + '"a"' + ")" * 3000,
    "GBNF without root": 'a ::= "b"',
    "GBNF left recursion": 'root ::= root "a" | "a"',
    "GBNF unfinished": 'root ::= "\\',
    "GBNF parentheses": "root ::= " + "(" * 3000 + '"a"' + ")" * 3000,
    "GBNF large count": 'root ::= "a"{99999999999}',
    "GBNF many rules": "root ::= r0\n"
    + "".join(f'r{n} ::= "a" r{n + 1} | "b"\n' for n in range(1500))
    + 'r1500 ::= "c"',
    "a strange option": '%llguidance {"no_forcing": 5}\nstart: "a"',
}

TAGS = {
    "no triggers": {"triggers": [], "structures": [{"begin": "<a>", "schema": {}, "end": ""}]},
    "another trigger": {"triggers": ["<b"], "structures": [{"begin": "<a>", "schema": {}, "end": ""}]},
    "deep": {"format": nested(20, {"type": "any_text"}, "elements")},
    "unknown": {"format": {"type": "magic"}},
    "many": {"format": {"type": "or", "elements": [{"type": "const_string", "value": f"v{n}"} for n in range(3000)]}},
    "a bad schema": {"format": {"type": "json_schema", "json_schema": {"not": {}}}},
    "a bad grammar": {"format": {"type": "grammar", "grammar": "start: nobody"}},
    "a slash": {"format": {"type": "regex", "pattern": "a/ | /b"}},
    "an end that never comes": {"format": {"type": "tag", "begin": "", "content": {"type": "any_text"}, "end": "\x00"}},
}


def hostile() -> dict[str, dict[str, Any]]:
    """Fields of a request by name."""
    found: dict[str, dict[str, Any]] = {}
    for name, schema in json_forms().items():
        found[f"json: {name}"] = {"structured_outputs": {"json": schema}}
    for name in ("not", "exponential", "a cycle of references", "a NUL", "oneOf", "a large bound"):
        found[f"lenient json: {name}"] = {"structured_outputs": {"json": json_forms()[name], "strict": False}}
    for name, regex in REGEXES.items():
        found[f"regex: {name}"] = {"structured_outputs": {"regex": regex}}
    for name, grammar in GRAMMARS.items():
        found[f"grammar: {name}"] = {"structured_outputs": {"grammar": grammar}}
    for name, tag in TAGS.items():
        found[f"tag: {name}"] = {"response_format": {"type": "structural_tag", **tag}}
    found["choice: many"] = {"structured_outputs": {"choice": [f"{n:x}" * 2 for n in range(10_000)]}}
    found["choice: long"] = {"structured_outputs": {"choice": ["x" * 60_000]}}
    found["choice: control characters"] = {"structured_outputs": {"choice": ["\x07\x1b", "\u202e\ufeff"]}}
    found["whitespace"] = {"structured_outputs": {"json_object": True, "whitespace_pattern": "((( )+)+)+"}}
    return found
