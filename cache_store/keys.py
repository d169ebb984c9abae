"""Compute digests: of JSON values (addresses) and of bytes (checksums)."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any

import xxhash

#: Types that JSON has and Python's encoder writes in one way only.
_SCALARS = frozenset({str, int, bool, type(None)})


def _is_plain(value: Any) -> bool:
    """Tell whether the encoder writes a value as it is; where not, `_canonical` makes it so or says what is wrong."""
    kind = type(value)
    if kind in _SCALARS:
        return True
    if kind is dict:
        return all(type(key) is str and (type(item) in _SCALARS or _is_plain(item)) for key, item in value.items())
    if kind is list or kind is tuple:
        return all(type(item) in _SCALARS or _is_plain(item) for item in value)
    return kind is float and math.isfinite(value)


def _canonical(value: Any, where: str) -> Any:
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"{where} is {value}: not finite, so not JSON")
        return value
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise TypeError(f"{where} has the key {key!r}: JSON keys are strings")
        return {key: _canonical(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_canonical(item, f"{where}[{i}]") for i, item in enumerate(value)]
    raise TypeError(f"{where} is a {type(value).__name__}: not a JSON value")


def canonical_json(value: Any) -> bytes:
    """Write a JSON value in its one UTF-8 spelling: keys sorted, no spaces, ASCII; tuples are lists.

    Raises TypeError for values JSON cannot hold (and for keys that are not strings), ValueError for NaN and
    inf.
    """
    # A plan of thousands of nodes is made of such values, and looking where one is wrong takes longer than writing it.
    plain = value if _is_plain(value) else _canonical(value, "value")
    text = json.dumps(plain, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return text.encode("ascii")


def digest_json(value: Any) -> str:
    """Compute the sha256 of the canonical JSON of `value`, cut to 32 lower-case hex characters. Errors as
    `canonical_json`."""
    return hashlib.sha256(canonical_json(value)).hexdigest()[:32]


class Digests:
    """Byte count, xxh3_128 and sha256 of a stream of bytes; feed it with `update`."""

    def __init__(self) -> None:
        self.bytes = 0
        self._xxh3 = xxhash.xxh3_128()
        self._sha256 = hashlib.sha256()

    def update(self, chunk: memoryview) -> None:
        """Add `chunk` (contiguous, one byte an item)."""
        self.bytes += chunk.nbytes
        self._xxh3.update(chunk)
        self._sha256.update(chunk)

    @property
    def xxh3(self) -> str:
        """xxh3_128 so far, 32 hex characters: finds damage, at memory speed."""
        return self._xxh3.hexdigest()

    @property
    def sha256(self) -> str:
        """sha256 so far, 64 hex characters: the identity other parts may rely on."""
        return self._sha256.hexdigest()
