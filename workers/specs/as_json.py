"""Turn task dataclasses into JSON values and back, strictly."""

from __future__ import annotations

import dataclasses
import types
import typing
from typing import Any, TypeVar

T = TypeVar("T")


def to_json(spec: Any) -> dict[str, Any]:
    """The spec as JSON values (tuples become lists)."""
    plain = typing.cast("dict[str, Any]", _plain(dataclasses.asdict(spec)))
    for name in getattr(spec, "LATER", ()):
        if plain[name] is None:
            del plain[name]
    return plain


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def from_json(cls: type[T], data: Any) -> T:
    """Inverse of `to_json`. The data was validated when the configuration was loaded; unknown keys still fail."""
    return typing.cast(T, _build(cls, data))


def _build(hint: Any, value: Any) -> Any:
    variant = None if dataclasses.is_dataclass(hint) else getattr(hint, "variant", None)
    if variant is not None:
        # A base class that says which of its dataclasses these values are of.
        hint = variant(value)
    if dataclasses.is_dataclass(hint):
        hints = typing.get_type_hints(hint)
        return hint(**{key: _build(hints[key], item) for key, item in value.items()})  # type: ignore[operator]
    origin = typing.get_origin(hint)
    arguments = typing.get_args(hint)
    if origin is tuple and isinstance(value, list):
        if len(arguments) == 2 and arguments[1] is Ellipsis:
            return tuple(_build(arguments[0], item) for item in value)
        return tuple(_build(argument, item) for argument, item in zip(arguments, value, strict=True))
    if origin in (typing.Union, types.UnionType) and value is not None:
        classes = [argument for argument in arguments if dataclasses.is_dataclass(argument)]
        if classes and isinstance(value, dict):
            # The first that has all these fields: no two members of a union here have the same.
            return _build(next(c for c in classes if value.keys() <= {f.name for f in dataclasses.fields(c)}), value)
        for argument in arguments:
            if typing.get_origin(argument) is tuple and isinstance(value, list):
                return _build(argument, value)
    return value
