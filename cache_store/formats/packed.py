"""Packed shard bytes (codec 2): byte planes of every column, each one zstd frame. Lossless, decoded a shard at a time.

Byte `k` of all values of a column lies together: signs and exponents repeat where mantissas do not, so they pack well
apart from them. The file is an Arrow IPC file like a plain shard's, of a single row: a column a plane, named
`<field>.<k>`, as wide as its frame. What a frame unpacks to is known from the set's geometry and nothing else is
accepted, so no length in a file decides how much memory is taken.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from cache_store.errors import CorruptShard
from cache_store.formats import codec
from cache_store.formats.codec import Array, Field

if TYPE_CHECKING:
    from cache_store.storage.base import Buffer

# Higher levels took several times as long for one part in a hundred.
_LEVEL = 1


def _zstd() -> pa.Codec:
    return pa.Codec("zstd", compression_level=_LEVEL)


def _metadata(fields: Sequence[Field], rows: int) -> codec.Metadata:
    return (*codec.describe(fields, codec.PACKED), ("segprop.rows", str(rows)))


def encode(fields: Sequence[Field], arrays: Sequence[Array]) -> list[Buffer]:
    """Encode arrays as the pieces of a packed shard file; arguments and errors as `codec.encode`'s."""
    rows = codec.check_arrays(fields, arrays)
    zstd = _zstd()
    planes: list[Field] = []
    frames: list[Array] = []
    for field, array in zip(fields, arrays, strict=True):
        size = field.numpy_dtype.itemsize
        values = np.ascontiguousarray(array).reshape(-1).view(np.uint8).reshape(-1, size)
        for k in range(size):
            frame = np.frombuffer(zstd.compress(np.ascontiguousarray(values[:, k])), np.uint8)
            planes.append(_plane(field, k, len(frame)))
            frames.append(frame)
    return codec.encode_columns(planes, frames, 1, _metadata(fields, rows))


def decode(buffer: Buffer, fields: Sequence[Field], rows: int) -> tuple[Array, ...]:
    """Return the arrays of a packed shard file, read-only, in memory of their own: (rows, *shape) each.

    CorruptShard when `buffer` is not exactly a packed shard of `rows` rows of `fields`. Verify the file's checksum
    first.
    """
    with codec.damage_is_corrupt():
        source = codec.as_buffer(buffer)
        planes = _planes(source, fields)
        frames = iter(codec.decode_columns(source, planes, 1, _metadata(fields, rows)))
        zstd = _zstd()
        return tuple(_unpack(zstd, field, rows, frames) for field in fields)


def _plane(field: Field, k: int, width: int) -> Field:
    return Field(f"{field.name}.{k}", "uint8", (width,))


def _planes(source: pa.Buffer, fields: Sequence[Field]) -> list[Field]:
    """The columns of this file: names from the set, widths from its schema."""
    schema = pa.ipc.open_file(pa.BufferReader(source)).schema
    wanted = [(field, k) for field in fields for k in range(field.numpy_dtype.itemsize)]
    if len(schema) != len(wanted) or not all(pa.types.is_fixed_size_binary(kind) for kind in schema.types):
        raise CorruptShard("the shard's columns are not the byte planes of its set's fields")
    return [_plane(field, k, kind.byte_width) for (field, k), kind in zip(wanted, schema.types, strict=True)]


def _unpack(zstd: pa.Codec, field: Field, rows: int, frames: Iterator[Array]) -> Array:
    count = rows * math.prod(field.shape)
    size = field.numpy_dtype.itemsize
    if size == 1:
        values: Array = np.frombuffer(zstd.decompress(next(frames), decompressed_size=count), np.uint8)
    else:
        values = np.empty((count, size), np.uint8)
        for k in range(size):
            # Refuses a frame of any other length.
            values[:, k] = np.frombuffer(zstd.decompress(next(frames), decompressed_size=count), np.uint8)
    array: Array = values.reshape(-1).view(field.numpy_dtype).reshape(rows, *field.shape)
    array.flags.writeable = False
    return array
