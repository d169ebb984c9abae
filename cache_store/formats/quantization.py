"""Logical tensors to stored columns and back, on whatever device they are."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from cache_store.formats import codec
from cache_store.formats.codec import Field
from cache_store.formats.encodings import BLOCK, EncodingName, columns
from cache_store.formats.torch_dtypes import TORCH

#: Largest code: 127 of int8, and of float8_e4m3fn its largest finite value.
_LARGEST = {"int8": 127.0, "fp8": 448.0}
#: Smallest scale: below it a quotient would need subnormal numbers, which some devices flush to zero.
_TINY = torch.finfo(torch.float32).tiny


class Encoding:
    """Maps rows of `logical` fields (float32, bfloat16 or float16) to rows of stored `fields` and back.

    Every function is elementwise or a maximum, so neither batch nor threads change a bit: a row decodes to the same
    values wherever it is read. Values that are not finite cannot be scaled: their whole block decodes to NaN, so that
    a stage which meets it stops with a loss that is not finite.
    """

    def __init__(self, name: EncodingName, logical: Sequence[Field]) -> None:
        self.name = name
        self.logical = tuple(logical)
        self.fields = tuple(
            Field(f"{field.name}.{column.suffix}" if column.suffix else field.name, column.dtype, column.shape)
            for field in logical
            for column in columns(name, field.dtype, field.shape)
        )
        self.codec_version = codec.PACKED if name == "lossless" else codec.VERSION

    def encode(self, rows: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Stored columns of logical rows, in the order of `fields` and of their dtypes."""
        if self.name in ("plain", "lossless"):
            return tuple(rows)
        return tuple(
            stored for tensor, field in zip(rows, self.logical, strict=True) for stored in self._encode(tensor, field)
        )

    def decode(self, stored: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Logical rows of stored columns, new tensors; of `plain` and `lossless` the columns themselves."""
        if self.name in ("plain", "lossless"):
            return tuple(stored)
        pairs = zip(stored[0::2], stored[1::2], strict=True)
        return tuple(self._decode(*pair, field) for pair, field in zip(pairs, self.logical, strict=True))

    def _encode(self, rows: Tensor, field: Field) -> tuple[Tensor, Tensor]:
        blocks = self._blocks(rows.float(), field)
        scale = (blocks.abs().amax(-1) / _LARGEST[self.name]).clamp_min(_TINY)
        codes = (blocks / scale.unsqueeze(-1)).nan_to_num(0.0)
        code = codes.round().to(torch.int8) if self.name == "int8" else codes.to(torch.float8_e4m3fn)
        _, scales = columns(self.name, field.dtype, field.shape)
        return self._rows(code, field).contiguous(), scale.view(len(rows), *scales.shape)

    def _decode(self, code: Tensor, scale: Tensor, field: Field) -> Tensor:
        blocks = self._blocks(code.view(torch.int8), field)
        scale = scale.view(*blocks.shape[:-1], 1)
        if self.name == "fp8":
            # The bits of a float16 that is 2^8 smaller, subnormals too: several times faster than torch's conversion.
            shifted = (blocks.to(torch.int16) << 7) & ~(1 << 14)
            blocks, scale = shifted.view(torch.float16), scale * 256.0
        return self._rows(blocks * scale, field).to(TORCH[field.dtype])  # promoted: the product is float32

    def _blocks(self, rows: Tensor, field: Field) -> Tensor:
        """(N, blocks, values), a short last block filled up with zeros."""
        if len(field.shape) == 3:
            return rows.reshape(len(rows), field.shape[0], -1)
        size, last = BLOCK[self.name], field.shape[-1]
        short = -last % size
        if short and last > size:
            rows = F.pad(rows, (0, short))
        return rows.reshape(len(rows), -1, min(size, last))

    @staticmethod
    def _rows(blocks: Tensor, field: Field) -> Tensor:
        """The inverse of `_blocks`."""
        if math.prod(blocks.shape[1:]) == math.prod(field.shape):
            return blocks.reshape(len(blocks), *field.shape)
        return blocks.reshape(len(blocks), *field.shape[:-1], -1)[..., : field.shape[-1]]
