"""Shard bytes: an Arrow IPC *file*, one record batch, one fixed-size-binary column a field, uncompressed.

The IPC file format, not the stream: any Arrow tool opens or maps it as it is, and its footer at the end means
a truncated file does not parse. Everything around the columns depends only on (fields, rows), so it is made
once and the arrays' own memory goes to the storage between its pieces: encoding copies nothing. Every column
starts at a multiple of 64 bytes in the file (Arrow alone gives 8), so a mapped file gives 64-byte aligned
arrays.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from cache_store.errors import CorruptShard
from cache_store.formats.dtypes import STORED

if TYPE_CHECKING:
    from cache_store.storage.base import Buffer

Array = npt.NDArray[Any]

VERSION = 1
#: The layout of `packed`.
PACKED = 2
ALIGNMENT = 64
_MAX_ROW_BYTES = 2**31 - 1  # Arrow's widths are int32
_MAX_FRAME_BYTES = 1 << 20
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}")


@dataclass(frozen=True)
class Field:
    """One value a row: `shape` without the row dimension (`()` for a scalar), dtype one of
    those of `STORED`. ValueError when it is not storable."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise ValueError(f"field name {self.name!r}: use letters, digits, '_', '.' and '-'")
        if self.dtype not in STORED:
            raise ValueError(f"field {self.name}: dtype {self.dtype!r}; allowed: {', '.join(STORED)}")
        if not all(type(size) is int and size > 0 for size in self.shape):
            raise ValueError(f"field {self.name}: shape {self.shape} must be of positive ints")
        if self.bytes > _MAX_ROW_BYTES:
            raise ValueError(f"field {self.name}: {self.bytes} bytes a row; at most {_MAX_ROW_BYTES}")

    @property
    def numpy_dtype(self) -> np.dtype[Any]:
        """The dtype of its arrays: its own, or unsigned integers for bfloat16 and float8."""
        return np.dtype(STORED[self.dtype])

    @property
    def bytes(self) -> int:
        """Bytes one row takes."""
        return math.prod(self.shape) * self.numpy_dtype.itemsize


class _Sink:
    """A file for Arrow's writer that keeps the pieces; the columns' own buffers arrive as pa.Buffer."""

    closed = False

    def __init__(self) -> None:
        self.pieces: list[bytes | None] = []  # None: the next column's bytes
        self.position = 0
        self.body: int | None = None

    def write(self, data: Any) -> int:
        if isinstance(data, pa.Buffer):
            if self.body is None:
                self.body = self.position
            self.pieces.append(None)
        else:
            self.pieces.append(bytes(data))
        self.position += len(data)
        return len(data)

    def tell(self) -> int:
        return self.position

    def flush(self) -> None:
        pass

    def close(self) -> None:
        pass

    def readable(self) -> bool:
        return False

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return False


def _padded(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


#: What a shard's schema says of it, in order, but for the padding.
Metadata = tuple[tuple[str, str], ...]


def describe(fields: Sequence[Field], version: int = VERSION) -> Metadata:
    """Return the metadata of a shard of `fields`."""
    listing = json.dumps([[f.name, f.dtype, list(f.shape)] for f in fields], separators=(",", ":"))
    return (("segprop.codec", str(version)), ("segprop.fields", listing))


def _schema(fields: Sequence[Field], padding: int, metadata: Metadata) -> Any:
    columns = [pa.field(f.name, pa.binary(f.bytes), nullable=False) for f in fields]
    return pa.schema(columns, metadata={**dict(metadata), "segprop.pad": " " * padding})


@lru_cache(maxsize=256)
def _frame(fields: tuple[Field, ...], rows: int, metadata: Metadata) -> tuple[bytes | None, ...]:
    """The file's pieces, None standing for each column's bytes (padded to 64) in turn."""
    # A stand-in of the right length for every column: never read, so its pages are never made real.
    stand_in = np.empty(max(_padded(f.bytes * rows) for f in fields), np.uint8)
    for padding in range(0, ALIGNMENT, 8):
        schema = _schema(fields, padding, metadata)
        columns = [
            pa.Array.from_buffers(kind, rows, [None, pa.py_buffer(stand_in[: _padded(kind.byte_width * rows)])])
            for kind in schema.types
        ]
        sink = _Sink()
        with pa.PythonFile(sink, mode="w") as file, pa.ipc.new_file(file, schema) as writer:
            writer.write_batch(pa.record_batch(columns, schema=schema))
        if sink.pieces.count(None) != len(fields):
            break
        if sink.body is not None and sink.body % ALIGNMENT == 0:
            return tuple(sink.pieces)
    raise AssertionError("this pyarrow writes record batches in a way the codec does not know")


def encode(fields: Sequence[Field], arrays: Sequence[Array]) -> list[Buffer]:
    """Encode arrays as the pieces of a shard file, to be written one after the other. C-contiguous arrays are not
    copied.

    `arrays[k]` is (rows, *fields[k].shape) of `fields[k].numpy_dtype` (uint16 bits for bfloat16), rows >= 1.
    ValueError when shapes or dtypes differ.
    """
    return encode_columns(fields, arrays, check_arrays(fields, arrays), describe(fields))


def check_arrays(fields: Sequence[Field], arrays: Sequence[Array]) -> int:
    """Return how many rows these arrays have. ValueError when shapes or dtypes are not those of `fields`."""
    if not fields or len(fields) != len(arrays):
        raise ValueError(f"{len(arrays)} arrays for {len(fields)} fields")
    rows = len(arrays[0]) if arrays[0].ndim else 0
    for field, array in zip(fields, arrays, strict=True):
        if rows < 1 or array.shape != (rows, *field.shape) or array.dtype != field.numpy_dtype:
            raise ValueError(
                f"field {field.name}: expected {field.numpy_dtype} {(max(rows, 1), *field.shape)}, "
                f"got {array.dtype} {array.shape}"
            )
    return rows


def encode_columns(fields: Sequence[Field], arrays: Sequence[Array], rows: int, metadata: Metadata) -> list[Buffer]:
    """Encode as `encode` does, in any layout that puts whole columns into a frame; shapes and dtypes are not
    checked."""
    pieces: list[Buffer] = []
    columns = iter(arrays)
    for piece in _frame(tuple(fields), rows, metadata):
        if piece is not None:
            pieces.append(piece)
            continue
        column = np.ascontiguousarray(next(columns))
        pieces.append(column.reshape(-1).view(np.uint8).data)
        if slack := _padded(column.nbytes) - column.nbytes:
            pieces.append(bytes(slack))
    return pieces


def decode(buffer: Buffer, fields: Sequence[Field], rows: int) -> tuple[Array, ...]:
    """Return the arrays of a shard file, as read-only views of `buffer` (kept alive by them): (rows, *shape) each.

    CorruptShard when `buffer` is not exactly a shard of `rows` rows of `fields`. Values are not checked:
    verify the file's checksum first.
    """
    with damage_is_corrupt():
        return decode_columns(as_buffer(buffer), fields, rows, describe(fields))


@contextlib.contextmanager
def damage_is_corrupt() -> Iterator[None]:
    """Raise CorruptShard for everything that Arrow raises for malformed input."""
    try:
        yield
    except (pa.ArrowException, OSError, ValueError, TypeError, KeyError, IndexError, MemoryError) as error:
        raise CorruptShard(f"not a readable shard: {error}") from error


def as_buffer(buffer: Buffer) -> pa.Buffer:
    return buffer if isinstance(buffer, pa.Buffer) else pa.py_buffer(buffer)


def decode_columns(source: pa.Buffer, fields: Sequence[Field], rows: int, metadata: Metadata) -> tuple[Array, ...]:
    """Return the columns of a frame that has exactly these fields, rows and metadata; in `damage_is_corrupt`."""
    body = sum(_padded(f.bytes * rows) for f in fields)
    if not body <= source.size <= body + _MAX_FRAME_BYTES:
        raise CorruptShard(f"{source.size} bytes cannot be a shard of {rows} rows ({body} bytes of columns)")
    reader = pa.ipc.open_file(pa.BufferReader(source))
    found = reader.schema.metadata or {}
    if found.get(b"segprop.codec") != dict(metadata)["segprop.codec"].encode():
        raise CorruptShard(f"codec version {found.get(b'segprop.codec')!r}, expected {dict(metadata)['segprop.codec']}")
    same = all(found.get(key.encode()) == value.encode() for key, value in metadata)
    if not same or not reader.schema.equals(_schema(fields, 0, metadata)):
        raise CorruptShard("the shard's fields are not those of its set")
    if reader.num_record_batches != 1:
        raise CorruptShard(f"{reader.num_record_batches} record batches, expected 1")
    batch = reader.get_batch(0)
    if batch.num_rows != rows or batch.num_columns != len(fields):
        raise CorruptShard(f"{batch.num_rows} rows of {batch.num_columns} columns, expected {rows} of {len(fields)}")
    arrays = []
    end = source.address
    for field, column in zip(fields, batch.columns, strict=True):
        validity, data = column.buffers()
        size = field.bytes * rows
        # In order, apart from each other and inside the source: so neither decompressed nor pointing
        # elsewhere.
        inside = data is not None and end <= data.address and data.address + size <= source.address + source.size
        if validity is not None or column.offset != 0 or not inside or data.size < size:
            raise CorruptShard(f"column {field.name} is not laid out as a shard's")
        end = data.address + size
        array: Array = np.frombuffer(data, field.numpy_dtype, count=size // field.numpy_dtype.itemsize)
        array = array.reshape(rows, *field.shape)
        array.flags.writeable = False
        arrays.append(array)
    return tuple(arrays)
