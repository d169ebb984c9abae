"""How a boundary's values are kept: one object an encoding, which says what it stores of a logical field and does it.

A *logical* field is what a stage trains on; *stored* fields are what lies in a shard. `plain` and `lossless` store the
logical fields themselves (`lossless` in codec 2, which packs a whole shard). `int8` and `fp8` store one byte a value
and a float32 scale a block of values. Plans read this table, so it loads no torch; `quantization` does the arithmetic.

To add an encoding: subclass `Encoding`, and add its row to `ENCODINGS` and its name to `EncodingName`.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from cache_store.formats.dtypes import ITEM_BYTES

if TYPE_CHECKING:
    from torch import Tensor

    Shape = tuple[int, ...]

EncodingName = Literal["plain", "lossless", "int8", "fp8"]


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


class Encoding(abc.ABC):
    """Turns rows of a logical field (float32, bfloat16 or float16) into its stored columns and back.

    Both directions work row by row, so neither batch nor threads change a bit: a row decodes to the same values
    wherever it is read.
    """

    @property
    def packs(self) -> bool:
        """Whether a whole shard is packed besides, losslessly."""
        return False

    @abc.abstractmethod
    def columns(self, dtype: str, shape: Shape) -> tuple[Column, ...]:
        """Say what is stored of a row of `shape` and logical `dtype`."""

    def row_bytes(self, dtype: str, shape: Shape) -> int:
        """Count the stored bytes of a row; where shards are packed the most it takes, which only packing can tell."""
        return sum(column.bytes for column in self.columns(dtype, shape))

    @abc.abstractmethod
    def identity(self) -> dict[str, Any] | None:
        """Return what a set's key says of it; None where rows are the logical values themselves."""

    @abc.abstractmethod
    def encode(self, rows: Tensor, shape: Shape) -> tuple[Tensor, ...]:
        """Return the stored columns of (N, *shape) logical rows, in the order and dtypes of `columns`."""

    @abc.abstractmethod
    def decode(self, stored: Sequence[Tensor], dtype: str, shape: Shape) -> Tensor:
        """Return the logical rows, (N, *shape) of `dtype`, of these columns."""


class Plain(Encoding):
    """Stores the logical values themselves."""

    def columns(self, dtype: str, shape: Shape) -> tuple[Column, ...]:
        """See `Encoding`."""
        return (Column("", dtype, shape),)

    def identity(self) -> dict[str, Any] | None:
        """See `Encoding`."""
        return None

    def encode(self, rows: Tensor, shape: Shape) -> tuple[Tensor, ...]:
        """See `Encoding`: the rows themselves."""
        return (rows,)

    def decode(self, stored: Sequence[Tensor], dtype: str, shape: Shape) -> Tensor:
        """See `Encoding`: the column itself."""
        return stored[0]


class Lossless(Plain):
    """Stores the logical values themselves, in packed shards."""

    @property
    def packs(self) -> bool:
        """See `Encoding`."""
        return True


@dataclass(frozen=True)
class BlockScaled(Encoding):
    """Stores a code of one byte for each value, of type `code`, and a float32 scale for each block of values.

    Maps (C, H, W) have a scale each: channels differ by orders of magnitude, pixels of one do not. Anything else has
    one a run of `block` values along its last axis, the last run perhaps shorter. Values that are not finite cannot be
    scaled: their whole block decodes to NaN, so that a stage which meets it stops with a loss that is not finite.
    """

    name: str
    block: int
    code: str

    def columns(self, dtype: str, shape: Shape) -> tuple[Column, ...]:
        """See `Encoding`."""
        scales = shape[:1] if len(shape) == 3 else (*shape[:-1], -(-shape[-1] // self.block))
        return (Column("code", self.code, shape), Column("scale", "float32", scales))

    def identity(self) -> dict[str, Any] | None:
        """See `Encoding`."""
        return {"name": self.name, "block": self.block, "version": 1}

    def encode(self, rows: Tensor, shape: Shape) -> tuple[Tensor, ...]:
        """See `Encoding`."""
        from cache_store.formats import quantization

        code, scale = quantization.quantize(rows, shape, self.block, self.code)
        _, scales = self.columns("float32", shape)
        return code, scale.view(len(rows), *scales.shape)

    def decode(self, stored: Sequence[Tensor], dtype: str, shape: Shape) -> Tensor:
        """See `Encoding`."""
        from cache_store.formats import quantization

        code, scale = stored
        return quantization.dequantize(code, scale, shape, self.block, self.code, dtype)


#: By the name a configuration gives. Blocks: hidden states have single values a thousand times the others, which a
#: longer block's int8 would round to zero; a float keeps its relative precision beside them.
ENCODINGS: dict[str, Encoding] = {
    "plain": Plain(),
    "lossless": Lossless(),
    "int8": BlockScaled("int8", block=32, code="int8"),
    "fp8": BlockScaled("fp8", block=128, code="float8_e4m3fn"),
}
