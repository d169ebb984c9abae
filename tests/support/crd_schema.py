"""Ray's custom resources against their CRDs, as strictly as `kubectl --validate=strict` would."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jsonschema
import yaml
from kustomize import Object, name_of


def crd_schema(path: Path) -> Object:
    """The `v1` schema of a CustomResourceDefinition as JSON Schema, as strict as `kubectl --validate=strict`."""
    document = yaml.load(path.read_text(), Loader=yaml.CSafeLoader)
    (version,) = [item for item in document["spec"]["versions"] if item["name"] == "v1" and item["served"]]
    schema: Object = _strict(version["schema"]["openAPIV3Schema"])
    return schema


_INTEGERS = {"int32": 2**31, "int64": 2**63}


def _strict(schema: Any) -> Any:
    """Unknown fields refused, bounded integers bounded, fields with a default optional, nullable ones nullable."""
    result = {key: value for key, value in schema.items() if not key.startswith("x-kubernetes-")}
    if schema.get("x-kubernetes-int-or-string"):
        result.pop("type", None)
        result["anyOf"] = [{"type": "integer"}, {"type": "string"}]
    properties = schema.get("properties")
    if properties is not None:
        result["properties"] = {name: _strict(child) for name, child in properties.items()}
        if not schema.get("x-kubernetes-preserve-unknown-fields"):
            result["additionalProperties"] = False
        result["required"] = [name for name in schema.get("required", []) if "default" not in properties[name]]
    elif isinstance(schema.get("additionalProperties"), dict):
        result["additionalProperties"] = _strict(schema["additionalProperties"])
    if "items" in schema:
        result["items"] = _strict(schema["items"])
    if (limit := _INTEGERS.get(schema.get("format", ""))) and schema.get("type") == "integer":
        result["minimum"] = max(result.get("minimum", -limit), -limit)
        result["maximum"] = min(result.get("maximum", limit - 1), limit - 1)
    if schema.get("nullable") and isinstance(result.get("type"), str):
        result["type"] = [result["type"], "null"]
    return result


def schema_problems(item: Object, schema: Object) -> list[str]:
    validator = jsonschema.Draft202012Validator(schema)
    return [
        f"{name_of(item)}: {'.'.join(str(part) for part in error.absolute_path)}: {error.message}"
        for error in validator.iter_errors(item)
    ]
