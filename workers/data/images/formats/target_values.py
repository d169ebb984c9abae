"""Read single targets of a user's data set, by their kind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from workers.specs.experiment import TargetKind

#: A class, or the values of a target.
TargetValue = int | np.ndarray


def read_target(kind: TargetKind, value: Any) -> TargetValue:
    """Return a target as it is stored: a class, or an array of float32 (of `given` whole numbers: int64).

    ValueError, with what is wrong about it, where it is none of its kind."""
    return _READERS[kind](value)


def target_bytes(target: TargetValue) -> bytes:
    """Return the bytes that a target is known by."""
    return target.to_bytes(8, "little") if isinstance(target, int) else target.tobytes()


def _class(value: Any) -> int:
    number = value.item() if hasattr(value, "item") and getattr(value, "shape", ()) == () else value
    if isinstance(number, bool) or not isinstance(number, int) or number < 0:
        raise ValueError(_shown(value))
    return number


def _labels(value: Any) -> np.ndarray:
    array = _array(value, "biuf")
    if array.ndim != 1:
        raise ValueError(_shaped(value, array))
    outside = array[~((array >= 0) & (array <= 1))]
    if len(outside):
        raise ValueError(f"{_shaped(value, array)} with the value {outside[0]}")
    return array.astype(np.float32)


def _numbers(value: Any) -> np.ndarray:
    array = _array(value, "iuf")
    if array.ndim > 1:
        raise ValueError(_shaped(value, array))
    with np.errstate(over="ignore"):
        numbers = np.atleast_1d(array.astype(np.float32))
    if not np.isfinite(numbers).all():
        raise ValueError(
            f"{_shaped(value, array)} with the value {array[~np.isfinite(numbers)][0]}" if array.ndim else _shown(value)
        )
    return numbers


def _given(value: Any) -> np.ndarray:
    array = _array(value, "biuf")
    return array.astype(np.float32 if np.issubdtype(array.dtype, np.floating) else np.int64)


#: Kind -> what makes a stored target of what a data set gives.
_READERS: dict[TargetKind, Callable[[Any], TargetValue]] = {
    "classes": _class,
    "labels": _labels,
    "numbers": _numbers,
    "given": _given,
}


def _array(value: Any, kinds: str) -> np.ndarray:
    """`value` as an array of numbers; `kinds`: as numpy calls the types that are allowed."""
    try:
        array = np.asarray(value)
    except Exception as error:  # whatever it raises is the user's own
        raise ValueError(_shown(value)) from error
    if array.dtype.kind not in kinds or 0 in array.shape:
        raise ValueError(_shaped(value, array))
    return array


def _shaped(value: Any, array: np.ndarray) -> str:
    return f"an array of {array.dtype} {array.shape}" if array.ndim else _shown(value)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 40 else f"a {type(value).__name__}"
