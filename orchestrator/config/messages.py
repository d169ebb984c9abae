"""Raw settings as a section, or what is wrong with them in words: the key, its value, what is allowed there."""

from __future__ import annotations

import dataclasses
import json
import re
import types
import typing
from collections.abc import Iterator
from functools import cache
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ValidationError

from cache_store.storage.addresses import redacted
from cache_store.suggest import did_you_mean, nearest
from orchestrator.config.schema import OVERRIDES, Config, RegimeConfig, validate
from orchestrator.config.values import OneOf
from orchestrator.config.yaml_loader import KeyPath, key_text
from workers.models.base import Finding
from workers.specs.experiment import TrainSpec

T = TypeVar("T")


def validated(kind: type[T], raw: Any, prefix: KeyPath, findings: list[Finding]) -> T | None:
    """Read `raw`, which stands at `prefix`, as `kind`. What is wrong is appended to `findings` and taken out of `raw`,
    so that later checks still see the rest with defaults in its place. None when that does not help."""
    pruned: set[KeyPath] = set()
    for _ in range(5):
        try:
            value: T = validate(kind, raw)
            return value
        except ValidationError as error:
            found = list(_explain(error, raw, kind, prefix))
            # What was taken out in an earlier round is not missing from the file.
            findings += [((*prefix, *path), message) for path, message in found if path not in pruned]
            # Where something needed is missing, the section around it goes: a regime without a kind.
            doomed = [path if _has(raw, path) else path[:-1] for path, _ in found]
            pruned.update((*doomed, *(path for path, _ in found)))
            for path in doomed:
                _prune(raw, path)
    return None


def _explain(error: ValidationError, raw: Any, kind: type[Any], prefix: KeyPath) -> Iterator[Finding]:
    """One finding per key, with the key's path inside `raw`. Alternatives of a union are joined by `or`."""
    grouped: dict[KeyPath, list[Any]] = {}
    for item in error.errors(include_url=False):
        grouped.setdefault(_real_path(item["loc"], raw, item["type"]), []).append(item)
    for path, items in grouped.items():
        first = items[0]
        value = _at(raw, path)
        if first["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
            message = "unknown key" + _suggest_key(kind, path, prefix)
        elif first["type"] in ("missing", "missing_argument"):
            message = "is required" + _allowed_values(kind, path)
        elif first["type"] in ("dataclass_type", "model_type", "dict_type", "model_attributes_type"):
            message = f"{show(value)}: must be a section with keys of its own"
        else:
            message = f"{show(value)}: {' or '.join(dict.fromkeys(_wording(item, value) for item in items))}"
        yield path, message


def _real_path(loc: tuple[str | int, ...], raw: Any, kind: str) -> KeyPath:
    """The error's location without the names of union members that pydantic puts into it."""
    path: list[str | int] = []
    here = raw
    for position, part in enumerate(loc):
        last = position == len(loc) - 1
        inside_list = isinstance(here, list) and isinstance(part, int) and part < len(here)
        if inside_list or (isinstance(here, dict) and part in here):
            path.append(part)
            here = here[part]
        elif last and kind.startswith("missing") and isinstance(here, dict | list):
            path.append(part)
    return tuple(path)


def _wording(item: Any, value: Any) -> str:
    if item["type"] == "value_error":
        return str(item["ctx"]["error"])
    message: str = item["msg"].replace("Input should be", "must be")
    if item["type"] == "string_pattern_mismatch":
        return "must start with a letter or digit and hold only letters, digits, '.', '-' and '_'"
    if item["type"] == "literal_error" and isinstance(value, str):
        choices = re.findall(r"'([^']*)'", message)
        message += did_you_mean(value, choices)
    return message[:1].lower() + message[1:]


def _suggest_key(kind: type[Any], path: KeyPath, prefix: KeyPath) -> str:
    wrong = str(path[-1])
    siblings = list(fields_of(_kind_at(kind, path[:-1])))
    close = nearest(wrong, siblings)
    if close is not None:
        return f"; did you mean {close}?"
    everywhere = [key for key in _all_keys(Config) if key[-1] == wrong]
    if everywhere and not prefix:
        return f"; did you mean {key_text(everywhere[0])}?"
    return f"; allowed here: {', '.join(siblings)}" if siblings else ""


def _allowed_values(kind: type[Any], path: KeyPath) -> str:
    section, name = _kind_at(kind, path[:-1]), str(path[-1])
    hint = fields_of(section).get(name)
    choices = typing.get_args(hint) if typing.get_origin(hint) is Literal else _table_names(section, name)
    return f"; one of {', '.join(map(str, choices))}" if choices else ""


def _table_names(section: Any, name: str) -> tuple[str, ...]:
    """What a field allows that takes its values from a table; () for others."""
    if not (isinstance(section, type) and issubclass(section, BaseModel)):
        return ()
    tables = [item.table for item in section.model_fields[name].metadata if isinstance(item, OneOf)]
    return tuple(name for table in tables for name in table)


@cache
def fields_of(kind: Any) -> dict[str, Any]:
    """Keys of a section and their types (without bounds)."""
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return {name: field.annotation for name, field in kind.model_fields.items()}
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        return {field.name: hints[field.name] for field in dataclasses.fields(kind)}
    return {}


def _kind_at(kind: Any, path: KeyPath) -> Any:
    for index, part in enumerate(path):
        if kind is RegimeConfig and part in OVERRIDES:
            kind = OVERRIDES[str(part)]
            continue
        if kind is RegimeConfig and part == "stages":
            return TrainSpec if index + 1 < len(path) else None
        if typing.get_origin(kind) is dict:
            kind = typing.get_args(kind)[1]
            continue
        kind = fields_of(kind).get(str(part))
        if isinstance(kind, types.UnionType):
            kind = next((member for member in typing.get_args(kind) if fields_of(member)), None)
    return kind


def _all_keys(kind: Any, prefix: KeyPath = ()) -> Iterator[KeyPath]:
    for name, hint in fields_of(kind).items():
        yield (*prefix, name)
        yield from _all_keys(hint, (*prefix, name))


def _at(raw: Any, path: KeyPath) -> Any:
    for part in path:
        try:
            raw = raw[part]
        except (KeyError, IndexError, TypeError):
            return None
    return raw


def _has(raw: Any, path: KeyPath) -> bool:
    parent = _at(raw, path[:-1])
    return isinstance(parent, list) or (isinstance(parent, dict) and bool(path) and path[-1] in parent)


def _prune(raw: Any, path: KeyPath) -> None:
    """Take the key at `path` out; inside a list, take out the key that holds the list."""
    while path and isinstance(path[-1], int):
        path = path[:-1]
    if not path:
        return
    parent = _at(raw, path[:-1])
    if isinstance(parent, dict):
        parent.pop(path[-1], None)


def show(value: Any) -> str:
    """A value as a message quotes it, without credentials where it is an address that holds some."""
    text = json.dumps(value, ensure_ascii=False) if not isinstance(value, str) else redacted(value)
    return text if len(text) <= 80 else text[:77] + "..."
