"""Turn task dataclasses into JSON values and back, strictly; and records that other versions wrote, tolerantly."""

from __future__ import annotations

import dataclasses
import functools
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar, cast

T = TypeVar("T")
#: Makes a dataclass of JSON values.
_Reader = Callable[[type[Any], Mapping[str, Any]], Any]


def to_json(spec: Any) -> dict[str, Any]:
    """Write the spec as JSON values (tuples become lists). Fields named in the `LATER` of it, or of a dataclass in it,
    are written only where they are not None: what does not have them keeps its ids."""
    return cast("dict[str, Any]", _plain(spec))


@functools.cache
def _names(cls: Any) -> tuple[tuple[str, bool], ...]:
    """Names of the fields of a dataclass, and whether each is left out where it is None; () for any other type.
    `dataclasses.asdict`, which looks at every value and copies it, takes five times as long."""
    later = getattr(cls, "LATER", ())
    fields = dataclasses.fields(cls) if dataclasses.is_dataclass(cls) else ()
    return tuple((field.name, field.name in later) for field in fields)


def _plain(value: Any) -> Any:
    if isinstance(value, str | int | float) or value is None:
        return value
    names = _names(cast("Any", type(value)))
    if names:
        values = ((name, getattr(value, name), later) for name, later in names)
        return {name: _plain(item) for name, item, later in values if item is not None or not later}
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def from_json(cls: type[T], data: Any) -> T:
    """Inverse of `to_json`. The data was validated when the configuration was loaded; unknown keys still fail."""
    return cast("T", _build(cls, data, _strictly))


def write_record(record: Any) -> dict[str, Any]:
    """Write the fields of a record as JSON values, in order; those named in its `OMITTED` only where they are not
    None."""
    omitted = getattr(record, "OMITTED", ())
    values = {field.name: getattr(record, field.name) for field in dataclasses.fields(record)}
    return {name: _write(value) for name, value in values.items() if value is not None or name not in omitted}


def _write(value: Any) -> Any:
    if hasattr(value, "to_json"):
        return value.to_json()
    if isinstance(value, Mapping):
        return {key: _write(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_write(item) for item in value]
    return value


def read_record(cls: type[T], data: Mapping[str, Any]) -> T:
    """Inverse of `write_record`, of what this version or another one wrote: keys that `cls` does not know are passed
    over, fields with a default may be missing. ValueError, naming the first, when another one is."""
    return cast("T", _tolerantly(cls, data))


def _strictly(cls: type[Any], data: Mapping[str, Any]) -> Any:
    hints: dict[str, Any] = _hints(cast("Any", cls))
    return cls(**{key: _build(hints[key], item, _strictly) for key, item in data.items()})


def _tolerantly(cls: type[Any], data: Mapping[str, Any]) -> Any:
    hints: dict[str, Any] = _hints(cast("Any", cls))
    values: dict[str, Any] = {}
    for field in dataclasses.fields(cls):
        if field.name in data:
            values[field.name] = _build(hints[field.name], data[field.name], _one_way)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise ValueError(f"{cls.__name__} without {field.name!r}")
    return cls(**values)


def _one_way(cls: type[Any], data: Mapping[str, Any]) -> Any:
    """Read as the class itself does, where it says how."""
    read = getattr(cls, "from_json", None)
    return read(data) if read is not None else _tolerantly(cls, data)


@functools.cache
def _hints(cls: Any) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _build(hint: Any, value: Any, read: _Reader) -> Any:
    """Make of `value` what `hint` says; `read` makes the dataclasses in it."""
    variant = None if dataclasses.is_dataclass(hint) else getattr(hint, "variant", None)
    if variant is not None:
        # A base class that says which of its dataclasses these values are of.
        hint = variant(value)
    if dataclasses.is_dataclass(hint):
        return read(cast("type[Any]", hint), value)
    origin = typing.get_origin(hint)
    arguments = typing.get_args(hint)
    if origin is tuple and isinstance(value, list):
        return _tuple(arguments, value, read)
    if origin in (Mapping, dict) and (
        dataclasses.is_dataclass(arguments[1]) or typing.get_origin(arguments[1]) is tuple
    ):
        return {key: _build(arguments[1], item, read) for key, item in value.items()}
    if origin in (typing.Union, types.UnionType) and value is not None:
        return _one_of(arguments, value, read)
    return value


def _tuple(arguments: Sequence[Any], value: list[Any], read: _Reader) -> tuple[Any, ...]:
    if len(arguments) == 2 and arguments[1] is Ellipsis:
        return tuple(_build(arguments[0], item, read) for item in value)
    return tuple(_build(argument, item, read) for argument, item in zip(arguments, value, strict=True))


def _one_of(arguments: Sequence[Any], value: Any, read: _Reader) -> Any:
    classes = [argument for argument in arguments if dataclasses.is_dataclass(argument)]
    if classes and isinstance(value, dict):
        # The first that has all these fields: no two members of a union here have the same.
        known = (c for c in classes if value.keys() <= {field.name for field in dataclasses.fields(c)})
        return _build(classes[0] if len(classes) == 1 else next(known), value, read)
    for argument in arguments:
        if typing.get_origin(argument) in (tuple, Mapping) and isinstance(value, list | dict):
            return _build(argument, value, read)
    return value
