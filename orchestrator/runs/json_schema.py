"""Describe configuration files as a JSON schema, by which editors complete keys, show what they mean and mark mistakes.

It allows no more than a file may say section by section; rules between sections, and what a model or data set turns out
to be, are the program's own to check.
"""

from __future__ import annotations

import ast
import inspect
from typing import Any, cast

from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue
from pydantic_core import core_schema

from orchestrator.config.schema import OVERRIDES, config_class
from orchestrator.config.sweep_schema import SweepConfig
from orchestrator.config.values import OneOf, parse_seconds, parse_size
from workers.models.registry import DEFAULT, FAMILIES

DIALECT = "https://json-schema.org/draft/2020-12/schema"
#: Keys with a default that depends on the file's name.
_NAMED = ("run", "run_dir", "store")
#: Sections that are other ones for another family of models.
_OF_FAMILY = ("model", "data")


class _Generator(GenerateJsonSchema):
    """Writes the types of settings that pydantic has no words for."""

    def function_plain_schema(self, schema: core_schema.PlainValidatorFunctionSchema) -> JsonSchemaValue:
        """Names out of a table (`OneOf`)."""
        owner = getattr(schema["function"]["function"], "__self__", None)
        return {"enum": list(owner.table)} if isinstance(owner, OneOf) else super().function_plain_schema(schema)

    def function_before_schema(self, schema: core_schema.BeforeValidatorFunctionSchema) -> JsonSchemaValue:
        """Sizes and times, which may be texts such as 20GB or 12h."""
        inner = self.generate_inner(schema["schema"])
        texts = schema["function"]["function"] in (parse_size, parse_seconds)
        return {"anyOf": [inner, {"type": "string"}]} if texts else inner

    def dataclass_schema(self, schema: core_schema.DataclassSchema) -> JsonSchemaValue:
        """Sections that workers obey, whose words stand above their fields."""
        written = super().dataclass_schema(schema)
        for name, words in field_comments(schema["cls"]).items():
            if words and name in written.get("properties", {}):
                written["properties"][name].setdefault("description", words)
        return written


def field_comments(kind: type[Any]) -> dict[str, str]:
    """Return the `#:` lines above each field of a dataclass; "" where there are none."""
    source = inspect.getsource(kind)
    lines = source.splitlines()
    found: dict[str, str] = {}
    for statement in cast("ast.ClassDef", ast.parse(source).body[0]).body:
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            above: list[str] = []
            line = statement.lineno - 2
            while line >= 0 and lines[line].strip().startswith("#:"):
                above.insert(0, lines[line].strip().removeprefix("#:").strip())
                line -= 1
            found[statement.target.id] = " ".join(above)
    return found


def json_schema() -> dict[str, Any]:
    """Return the schema of all configuration files; `model.family` decides what `model` and `data` may say."""
    families = {name: _of_family(name) for name in FAMILIES}
    whole = families[DEFAULT]
    definitions: dict[str, Any] = {}
    for name, schema in families.items():
        # Sections of the same name differ from family to family.
        definitions |= {f"{name}.{key}": _renamed(each, name) for key, each in schema.pop("$defs").items()}
    sweep = SweepConfig.model_json_schema(schema_generator=_Generator)
    definitions |= {f"sweep.{key}": _renamed(each, "sweep") for key, each in sweep.pop("$defs", {}).items()}
    properties = _renamed(whole["properties"], DEFAULT)
    regimes = _regimes(properties, definitions)
    properties |= {
        "regimes": {**regimes, "description": properties["regimes"].get("description", "")},
        "sweep": {**_renamed(sweep, "sweep"), "description": "Runs the file many times with other settings."},
        **{key: {"type": "object"} for key in _OF_FAMILY},
    }
    return {
        "$schema": DIALECT,
        "title": "segprop configuration",
        "type": "object",
        "properties": properties,
        "required": list(_OF_FAMILY),
        "additionalProperties": False,
        "allOf": [_chosen(name, schema) for name, schema in families.items()],
        "$defs": definitions,
    }


def _of_family(name: str) -> dict[str, Any]:
    return config_class(name).model_json_schema(schema_generator=_Generator)


def _renamed(value: Any, family: str) -> Any:
    """Point references at the definitions of a family."""
    if isinstance(value, dict):
        return {
            key: item.replace("#/$defs/", f"#/$defs/{family}.") if key == "$ref" else _renamed(item, family)
            for key, item in value.items()
        }
    return [_renamed(item, family) for item in value] if isinstance(value, list) else value


def _regimes(properties: dict[str, Any], definitions: dict[str, Any]) -> dict[str, Any]:
    """Describe `regimes`: a name, a list of names, or name -> overrides of sections."""
    regime = definitions[f"{DEFAULT}.RegimeConfig"]
    kinds = regime["properties"]["kind"]
    regime["required"] = []  # where the name is that of a kind
    for key in OVERRIDES:
        if key in properties:
            regime["properties"][key] = {**regime["properties"][key], "$ref": properties[key]["$ref"]}
            regime["properties"][key].pop("type", None)
            regime["properties"][key].pop("additionalProperties", None)
    reference = {"$ref": f"#/$defs/{DEFAULT}.RegimeConfig"}
    overrides = {"type": "object", "additionalProperties": {"anyOf": [reference, {"type": "null"}]}, "minProperties": 1}
    names = {"enum": kinds["enum"]}
    return {"anyOf": [names, {"type": "array", "items": names, "minItems": 1}, overrides]}


def _chosen(name: str, schema: dict[str, Any]) -> dict[str, Any]:
    """Describe the sections that a family decides, where `model.family` names it."""
    family: dict[str, Any] = {"properties": {"family": {"const": name}}}
    if name != DEFAULT:
        family["required"] = ["family"]
    sections = {key: _renamed(schema["properties"][key], name) for key in _OF_FAMILY}
    return {"if": {"properties": {"model": family}}, "then": {"properties": sections}}
