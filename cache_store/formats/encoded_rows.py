"""All fields of a boundary under one encoding: the stored fields of a set, and rows on their way in and out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from cache_store.formats import codec
from cache_store.formats.codec import Field
from cache_store.formats.encodings import ENCODINGS

if TYPE_CHECKING:
    from torch import Tensor


class EncodedRows:
    """Maps rows of `logical` fields to rows of stored `fields` and back, by the encoding called `name`. A set of them
    has `codec_version`."""

    def __init__(self, name: str, logical: Sequence[Field]) -> None:
        self.name = name
        self.logical = tuple(logical)
        self._encoding = ENCODINGS[name]
        columns = [self._encoding.columns(field.dtype, field.shape) for field in self.logical]
        self._counts = [len(group) for group in columns]
        self.fields = tuple(
            Field(f"{field.name}.{column.suffix}" if column.suffix else field.name, column.dtype, column.shape)
            for field, group in zip(self.logical, columns, strict=True)
            for column in group
        )
        #: Whether files are packed, so that only the store knows their size.
        self.packs = self._encoding.packs
        self.codec_version = codec.PACKED if self.packs else codec.VERSION

    def encode(self, rows: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Return the stored columns of logical rows, in the order of `fields` and of their dtypes."""
        pairs = zip(rows, self.logical, strict=True)
        return tuple(stored for tensor, field in pairs for stored in self._encoding.encode(tensor, field.shape))

    def decode(self, stored: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Return the logical rows of stored columns: new tensors, or the columns themselves where they are the
        values."""
        rest = iter(stored)
        groups = [[next(rest) for _ in range(count)] for count in self._counts]
        return tuple(
            self._encoding.decode(group, field.dtype, field.shape)
            for group, field in zip(groups, self.logical, strict=True)
        )
