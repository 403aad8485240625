"""JSON Schema: the keywords in common use. An unknown keyword is an error when the schema is read, never ignored.

Formats are not checked (as the standard allows), and `$ref` reaches only into the schema itself: "#/$defs/name".
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from ..core import RequestError, unknown

Check = Callable[[Any, Any, Mapping[str, Any], Any], bool]  # the keyword's value, the instance, its schema, the root

_SAID = {
    *("$schema", "$id", "$comment", "title", "description", "default", "examples", "format", "deprecated"),
    *("$defs", "definitions", "then", "else", "readOnly", "writeOnly"),
    *("contentEncoding", "contentMediaType", "contentSchema"),
}
_TYPES: dict[str, Callable[[Any], bool]] = {
    "object": lambda value: isinstance(value, dict),
    "array": lambda value: isinstance(value, list),
    "string": lambda value: isinstance(value, str),
    "number": lambda value: _number(value),
    "integer": lambda value: _number(value) and (isinstance(value, int) or value.is_integer()),
    "boolean": lambda value: isinstance(value, bool),
    "null": lambda value: value is None,
}


def valid(instance: Any, schema: Any, root: Any = None) -> bool:
    """Whether parsed JSON is what the schema says. Raises RecursionError for a schema that refers to itself only."""
    root = schema if root is None else root
    if isinstance(schema, bool):
        return schema
    return all(_CHECKS[word](value, instance, schema, root) for word, value in schema.items() if word in _CHECKS)


def schema_error(text: str, schema: str) -> str | None:
    """What is wrong with a text that should be JSON of this schema (a text too); None when nothing is.

    Raises:
        RequestError: the schema has a keyword that is not checked here.
    """
    rules = json.loads(schema)
    try:
        check_schema(rules)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"structured_outputs.json cannot be checked: {error}", "structured_outputs.json") from None
    try:
        instance = json.loads(text)
    except (ValueError, RecursionError) as error:
        return f"the answer is not JSON: {error!s:.200}"
    try:
        return _fault(instance, rules, rules, "answer")
    except (OverflowError, RecursionError):
        return "the answer holds numbers or a depth that cannot be checked"


def _fault(instance: Any, schema: Any, root: Any, where: str) -> str | None:
    """The deepest place where a keyword is broken, and by which."""
    if isinstance(schema, bool):
        return None if schema else f"{where}: nothing is allowed here"
    for word, value in schema.items():
        if word not in _CHECKS or _CHECKS[word](value, instance, schema, root):
            continue
        if word == "properties":
            inside = (_fault(instance[n], part, root, f"{where}.{n}") for n, part in value.items() if n in instance)
            return next(filter(None, inside), None)
        if word == "items":
            first = len(schema.get("prefixItems", ()))
            rest = enumerate(instance[first:], first)
            return next(filter(None, (_fault(item, value, root, f"{where}[{at}]") for at, item in rest)), None)
        return f"{where}: breaks {word!r}"
    return None


def check_schema(schema: Any, root: Any = None, where: str = "schema") -> None:
    """Raises ValueError for a schema with a keyword, type, pattern or reference that means nothing here."""
    root = schema if root is None else root
    if isinstance(schema, bool):
        return
    if not isinstance(schema, dict):
        raise ValueError(f"'{where}' must be a table, true or false, not {schema!r}")
    for word, value in schema.items():
        if word not in _CHECKS and word not in _SAID:
            raise ValueError(f"'{where}': " + unknown("keyword", word, [*_CHECKS, *_SAID]))
        _check_value(word, value, root, f"{where}.{word}")
        if word in ONE:
            check_schema(value, root, f"{where}.{word}")
        elif word in MANY:
            for number, part in enumerate(value):
                check_schema(part, root, f"{where}.{word}[{number}]")
        elif word in NAMED:
            for name, part in value.items():
                check_schema(part, root, f"{where}.{word}.{name}")


def _check_value(word: str, value: Any, root: Any, where: str) -> None:
    kinds = {**dict.fromkeys(MANY, list), **dict.fromkeys(NAMED, dict), **_VALUES}
    if word in kinds and (not isinstance(value, kinds[word]) or (isinstance(value, bool) and kinds[word] is not bool)):
        raise ValueError(f"'{where}' cannot be {value!r}")
    if word == "multipleOf" and value <= 0:
        raise ValueError(f"'{where}' must be above 0, not {value!r}")
    if word == "type":
        for name in value if isinstance(value, list) else [value]:
            if name not in _TYPES:
                raise ValueError(f"'{where}': " + unknown("type", str(name), _TYPES))
    patterns = [value] if word == "pattern" else list(value) if word == "patternProperties" else []
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"'{where}' is no regular expression: {error}") from None
    if word == "$ref":
        _follow(value, root)


def _follow(reference: str, root: Any) -> Any:
    """The part of the schema that a reference names. Raises ValueError."""
    place = root
    if reference != "#" and not reference.startswith("#/"):
        raise ValueError(f"'$ref' can only point into the schema, as '#/$defs/name' does, not to '{reference}'")
    for step in reference.split("/")[1:]:
        step = step.replace("~1", "/").replace("~0", "~")
        if not isinstance(place, dict) or step not in place:
            raise ValueError(f"'$ref' points to '{reference}', which is not there")
        place = place[step]
    return place


def same(left: Any, right: Any) -> bool:
    """JSON's equality: 1 and 1.0 are the same, 1 and true are not."""
    if isinstance(left, bool) or isinstance(right, bool):
        return left is right
    if isinstance(left, dict) and isinstance(right, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if isinstance(left, list) and isinstance(right, list):
        return len(left) == len(right) and all(same(a, b) for a, b in zip(left, right))
    return bool(left == right)


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _properties(value: Any, instance: Any, schema: Mapping[str, Any], root: Any) -> bool:
    if not isinstance(instance, dict):
        return True
    return all(valid(instance[name], part, root) for name, part in value.items() if name in instance)


def _pattern_properties(value: Any, instance: Any, schema: Mapping[str, Any], root: Any) -> bool:
    if not isinstance(instance, dict):
        return True
    pairs = ((pattern, name) for pattern in value for name in instance if re.search(pattern, name))
    return all(valid(instance[name], value[pattern], root) for pattern, name in pairs)


def _additional(value: Any, instance: Any, schema: Mapping[str, Any], root: Any) -> bool:
    if not isinstance(instance, dict):
        return True
    known, patterns = schema.get("properties", {}), schema.get("patternProperties", {})
    rest = [n for n in instance if n not in known and not any(re.search(p, n) for p in patterns)]
    return all(valid(instance[name], value, root) for name in rest)


def _items(value: Any, instance: Any, schema: Mapping[str, Any], root: Any) -> bool:
    first = len(schema.get("prefixItems", ()))
    return not isinstance(instance, list) or all(valid(item, value, root) for item in instance[first:])


def _prefix_items(value: Any, instance: Any, schema: Mapping[str, Any], root: Any) -> bool:
    return not isinstance(instance, list) or all(valid(item, part, root) for item, part in zip(instance, value))


def _contains(value: Any, instance: Any, schema: Mapping[str, Any], root: Any) -> bool:
    if not isinstance(instance, list):
        return True
    count = sum(valid(item, value, root) for item in instance)
    return bool(schema.get("minContains", 1) <= count <= schema.get("maxContains", len(instance)))


def _dependent_required(value: Any, instance: Any, schema: Mapping[str, Any], root: Any) -> bool:
    if not isinstance(instance, dict):
        return True
    return all(other in instance for name, others in value.items() if name in instance for other in others)


def _dependent_schemas(value: Any, instance: Any, schema: Mapping[str, Any], root: Any) -> bool:
    if not isinstance(instance, dict):
        return True
    return all(valid(instance, part, root) for name, part in value.items() if name in instance)


def _property_names(value: Any, instance: Any, schema: Mapping[str, Any], root: Any) -> bool:
    return not isinstance(instance, dict) or all(valid(name, value, root) for name in instance)


def _unique(value: Any, instance: Any, schema: Mapping[str, Any], root: Any) -> bool:
    if not value or not isinstance(instance, list):
        return True
    return not any(same(a, b) for i, a in enumerate(instance) for b in instance[:i])


def _if(value: Any, instance: Any, schema: Mapping[str, Any], root: Any) -> bool:
    return valid(instance, schema.get("then" if valid(instance, value, root) else "else", True), root)


def _multiple(value: Any, instance: Any, schema: Mapping[str, Any], root: Any) -> bool:
    if not _number(instance):
        return True
    times = instance / value
    return bool(abs(times - round(times)) < 1e-9 * max(1.0, abs(times)))


def _bound(kind: type | tuple[type, ...], holds: Callable[[Any, Any], bool]) -> Check:
    def check(value: Any, instance: Any, schema: Mapping[str, Any], root: Any) -> bool:
        return not isinstance(instance, kind) or isinstance(instance, bool) or holds(instance, value)

    return check


def _types(value: Any, instance: Any, schema: Mapping[str, Any], root: Any) -> bool:
    return any(_TYPES[name](instance) for name in (value if isinstance(value, list) else [value]))


_CHECKS: dict[str, Check] = {
    "type": _types,
    "enum": lambda value, instance, schema, root: any(same(instance, choice) for choice in value),
    "const": lambda value, instance, schema, root: same(instance, value),
    "properties": _properties,
    "patternProperties": _pattern_properties,
    "additionalProperties": _additional,
    "propertyNames": _property_names,
    "dependentRequired": _dependent_required,
    "dependentSchemas": _dependent_schemas,
    "required": _bound(dict, lambda instance, value: all(name in instance for name in value)),
    "minProperties": _bound(dict, lambda instance, value: len(instance) >= value),
    "maxProperties": _bound(dict, lambda instance, value: len(instance) <= value),
    "items": _items,
    "prefixItems": _prefix_items,
    "contains": _contains,
    "minContains": lambda value, instance, schema, root: True,  # with contains
    "maxContains": lambda value, instance, schema, root: True,
    "minItems": _bound(list, lambda instance, value: len(instance) >= value),
    "maxItems": _bound(list, lambda instance, value: len(instance) <= value),
    "uniqueItems": _unique,
    "minLength": _bound(str, lambda instance, value: len(instance) >= value),
    "maxLength": _bound(str, lambda instance, value: len(instance) <= value),
    "pattern": _bound(str, lambda instance, value: re.search(value, instance) is not None),
    "minimum": _bound((int, float), lambda instance, value: instance >= value),
    "maximum": _bound((int, float), lambda instance, value: instance <= value),
    "exclusiveMinimum": _bound((int, float), lambda instance, value: instance > value),
    "exclusiveMaximum": _bound((int, float), lambda instance, value: instance < value),
    "multipleOf": _multiple,
    "allOf": lambda value, instance, schema, root: all(valid(instance, part, root) for part in value),
    "anyOf": lambda value, instance, schema, root: any(valid(instance, part, root) for part in value),
    "oneOf": lambda value, instance, schema, root: sum(valid(instance, part, root) for part in value) == 1,
    "not": lambda value, instance, schema, root: not valid(instance, value, root),
    "if": _if,
    "$ref": lambda value, instance, schema, root: valid(instance, _follow(value, root), root),
}
# Where schemas stand within a schema: one, a list of them, or a table of them.
ONE = ("additionalProperties", "propertyNames", "items", "contains", "not", "if", "then", "else")
MANY = ("allOf", "anyOf", "oneOf", "prefixItems")
NAMED = ("properties", "patternProperties", "dependentSchemas", "$defs", "definitions")
_COUNTS = (
    *("minProperties", "maxProperties", "minItems", "maxItems", "minLength", "maxLength", "minContains"),
    "maxContains",
)
_VALUES: dict[str, Any] = {
    "dependentRequired": dict,
    **dict.fromkeys(_COUNTS, int),
    **dict.fromkeys(("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"), (int, float)),
    **dict.fromkeys(("required", "enum"), list),
    **dict.fromkeys(("pattern", "$ref"), str),
    "uniqueItems": bool,
    "type": (str, list),
}
