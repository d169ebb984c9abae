"""How a boundary's values are kept: the columns that an encoding stores for a logical field. Pure, without torch.

A *logical* field is what a stage trains on; *stored* fields are what lies in a shard. `plain` and `lossless` store the
logical fields themselves (`lossless` in codec 2, which packs a whole shard). `int8` and `fp8` store one byte a value
and a float32 scale a block of values. `quantization` does the arithmetic.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from cache_store.formats.dtypes import ITEM_BYTES

EncodingName = Literal["plain", "lossless", "int8", "fp8"]

#: Values that share a scale: hidden states have single values a thousand times the others, which a longer block's
#: int8 would round to zero; a float keeps its relative precision beside them.
BLOCK = {"int8": 32, "fp8": 128}
CODE_DTYPE = {"int8": "int8", "fp8": "float8_e4m3fn"}


@dataclass(frozen=True)
class Column:
    """One stored column of a logical field called x: `x` itself, or `x.<suffix>`. `shape` is of one row."""

    suffix: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Of one row."""
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


def columns(encoding: EncodingName, dtype: str, shape: tuple[int, ...]) -> tuple[Column, ...]:
    """What `encoding` stores of a row of `shape` and logical `dtype`.

    Maps (C, H, W) have a scale each: channels differ by orders of magnitude, pixels of one do not. Anything else has
    one a run of `BLOCK` values along its last axis, the last run perhaps shorter.
    """
    if encoding in ("plain", "lossless"):
        return (Column("", dtype, shape),)
    scales = shape[:1] if len(shape) == 3 else (*shape[:-1], -(-shape[-1] // BLOCK[encoding]))
    return (Column("code", CODE_DTYPE[encoding], shape), Column("scale", "float32", scales))


def row_bytes(encoding: EncodingName, dtype: str, shape: tuple[int, ...]) -> int:
    """Stored bytes of a row; with `lossless` the most it takes, which only packing can tell."""
    return sum(column.bytes for column in columns(encoding, dtype, shape))


def identity(encoding: EncodingName) -> dict[str, Any] | None:
    """What a set's key says of it: nothing where rows are the logical values themselves."""
    if encoding in ("plain", "lossless"):
        return None
    return {"name": encoding, "block": BLOCK[encoding], "version": 1}
