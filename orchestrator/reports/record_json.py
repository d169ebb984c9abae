"""Turn frozen dataclasses into JSON values and back, by their fields.

A field is a JSON value, another record, or a tuple, mapping or optional of these. Two marks on a field change how it is
written: `OPTIONAL` leaves it out where it is None, and `REST` writes each item of a mapping as a key of the record
itself, so that keys which no field names are kept.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from cache_store.errors import CorruptRecord

T = TypeVar("T")

#: Metadata of a field that is left out of the JSON where it is None.
OPTIONAL: Mapping[str, Any] = {"optional": True}
#: Metadata of the mapping that holds what no other field names.
REST: Mapping[str, Any] = {"rest": True}


def to_json(record: Any) -> dict[str, Any]:
    """Return the record as JSON values: tuples become lists."""
    return typing.cast("dict[str, Any]", _plain(record))


def from_json(cls: type[T], data: Any, where: str = "") -> T:
    """Return the record that `to_json` made `data` from. `where`: what to call the data in errors.

    Raises CorruptRecord that names the key which is missing or unknown, or is no object or list where one is needed.
    Types of single values are not checked: these files are written by the program itself."""
    return typing.cast(T, _build(cls, data, where or cls.__name__))


def finite(value: Any) -> Any:
    """Return a JSON value with None for figures that are not finite: JSON has no NaN."""
    if isinstance(value, dict):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        out: dict[str, Any] = {}
        for field in dataclasses.fields(value):
            item = getattr(value, field.name)
            if field.metadata.get("rest"):
                out |= _plain(item)
            elif item is not None or not field.metadata.get("optional"):
                out[field.name] = _plain(item)
        return out
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _build(hint: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return _record(hint, value, where)
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None:
            return None
        # No field has a choice of two records or lists.
        inner = [each for each in arguments if dataclasses.is_dataclass(each) or typing.get_origin(each)]
        return _build(inner[0], value, where) if len(inner) == 1 else value
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise CorruptRecord(f"{where}: must be a list")
        return tuple(_build(arguments[0], item, f"{where}[{index}]") for index, item in enumerate(value))
    if origin is Mapping:
        return {key: _build(arguments[1], item, f"{where}.{key}") for key, item in _object(value, where).items()}
    return value


def _record(cls: type, value: Any, where: str) -> Any:
    left, hints, found = dict(_object(value, where)), _hints(cls), dict[str, Any]()
    fields = dataclasses.fields(cls)
    for field in fields:
        if field.name in left and not field.metadata.get("rest"):
            found[field.name] = _build(hints[field.name], left.pop(field.name), f"{where}.{field.name}")
    for field in fields:
        if field.metadata.get("rest"):
            found[field.name], left = left, {}
    needed = {f.name for f in fields if f.default is f.default_factory is dataclasses.MISSING}
    if missing := sorted(needed - found.keys()):
        raise CorruptRecord(f"{where}: has no {', '.join(missing)}")
    if left:
        raise CorruptRecord(f"{where}: unknown keys: {', '.join(sorted(left))}")
    return cls(**found)


def _object(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise CorruptRecord(f"{where}: must be an object")
    return value
