"""What an answer must look like: OpenAI's `response_format`, vLLM's `structured_outputs` and its older `guided_` names.

All of them become one StructuredOutputs; `strict` absent means true, since a form that holds only in part must be
asked for.
"""

from __future__ import annotations

from typing import Any

import msgspec

from ..core import RequestError
from ..engine.structured import StructuredOutputs


class TextFormat(msgspec.Struct, tag="text", forbid_unknown_fields=True):
    """Any text."""


class JsonObjectFormat(msgspec.Struct, tag="json_object", forbid_unknown_fields=True):
    """Any JSON object."""


class JsonSchema(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """OpenAI's table around a schema."""

    name: str | None = None
    description: str | None = None
    schema: Any = None
    strict: bool | None = None


class JsonSchemaFormat(msgspec.Struct, tag="json_schema", forbid_unknown_fields=True):
    """JSON of one schema."""

    json_schema: JsonSchema


class StructuralTagFormat(msgspec.Struct, tag="structural_tag", kw_only=True, forbid_unknown_fields=True):
    """Free text with forms inside, in the new notation or the old."""

    format: dict[str, Any] | None = None
    structures: list[dict[str, Any]] | None = None
    triggers: list[str] | None = None


ResponseFormat = TextFormat | JsonObjectFormat | JsonSchemaFormat | StructuralTagFormat


class StructuredFields(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """vLLM's `structured_outputs`, and `strict`."""

    json: Any = None
    json_object: bool | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    structural_tag: Any = None
    disable_any_whitespace: bool | None = None
    disable_additional_properties: bool | None = None
    whitespace_pattern: str | None = None
    strict: bool | None = None

    def form(self) -> StructuredOutputs:
        given = {name: value for name in self.__struct_fields__ if (value := getattr(self, name)) is not None}
        return StructuredOutputs(**given)


class Forms(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The fields of a request that say so; at most one kind of them may be sent."""

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredFields | None = None
    guided_json: Any = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    guided_whitespace_pattern: str | None = None

    def form(self) -> StructuredOutputs | None:
        """The one form that was asked for.

        Raises:
            RequestError: two were, or it is none; naming the field as it was sent.
        """
        guided = [
            name for name in ("json", "regex", "choice", "grammar") if getattr(self, f"guided_{name}") is not None
        ]
        asked = [f"guided_{name}" for name in guided]
        if self.response_format is not None and not isinstance(self.response_format, TextFormat):
            asked.append("response_format")
        if self.structured_outputs is not None:
            asked.append("structured_outputs")
        if len(asked) > 1:
            raise RequestError(f"{' and '.join(asked)} exclude each other: send one", asked[-1])
        try:
            if self.structured_outputs is not None:
                return self.structured_outputs.form()
            if guided:
                pattern = self.guided_whitespace_pattern
                value = {guided[0]: getattr(self, asked[0])}
                return StructuredFields(**value, whitespace_pattern=pattern).form()
            return self._of_format()
        except RequestError as error:
            error.param = self.field(error.param)
            raise

    def _of_format(self) -> StructuredOutputs | None:
        match self.response_format:
            case JsonObjectFormat():
                return StructuredOutputs(json_object=True)
            case JsonSchemaFormat(json_schema=table):
                if table.schema is None:
                    raise RequestError("response_format.json_schema has no schema", "structured_outputs.json")
                return StructuredOutputs(json=table.schema, strict=table.strict is not False)
            case StructuralTagFormat(format=None) as old if old.structures is not None:
                tag = {"type": "structural_tag", "structures": old.structures, "triggers": old.triggers}
                return StructuredOutputs(structural_tag=tag)
            case StructuralTagFormat(format=dict() as form, structures=None, triggers=None):
                return StructuredOutputs(structural_tag={"type": "structural_tag", "format": form})
            case StructuralTagFormat():
                raise RequestError("a structural_tag has a format, or structures and triggers: send one", None)
        return None

    def field(self, param: str | None) -> str | None:
        """The path of what was sent, for a path within StructuredOutputs."""
        inner = (param or "").removeprefix("structured_outputs").removeprefix(".")
        if isinstance(self.response_format, JsonSchemaFormat):
            return "response_format.json_schema.schema"
        if self.response_format is not None and not isinstance(self.response_format, TextFormat):
            return "response_format"
        if self.structured_outputs is None and inner:
            return f"guided_{inner}"
        return param
