"""Rows of Parquet and Arrow IPC files, through pyarrow, a bounded number of them in memory."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from cache_store.errors import DataError
from workers.data.text.corpora.base import Record, failed
from workers.data.text.corpora.files import Folder, TextFile
from workers.data.text.corpora.rows.columns import Columns

_READ_ROWS = 1024
#: With what an Arrow file begins that is no bare stream. Behind it (and two bytes of padding) is a stream.
_FILE_MARK = b"ARROW1\0\0"


def parquet_names(folder: Folder, file: TextFile) -> list[str]:
    """Return the names of the columns, by the footer."""
    with _parquet(folder, file) as parquet:
        return list(parquet.schema_arrow.names)


def parquet_rows(folder: Folder, file: TextFile, columns: Columns) -> tuple[int, int]:
    """Return (rows, bytes of the columns uncompressed), by the footer."""
    with _parquet(folder, file) as parquet:
        size = 0
        for group in range(parquet.num_row_groups):
            found = parquet.metadata.row_group(group)
            for index in range(found.num_columns):
                if found.column(index).path_in_schema.split(".")[0] in columns.names:
                    size += found.column(index).total_uncompressed_size
        return int(parquet.metadata.num_rows), size


def parquet_records(
    folder: Folder, file: TextFile, columns: Columns, wanted: np.ndarray | None
) -> Iterator[tuple[int, Record]]:
    """Yield (number in the file, record) where `wanted` is set (None: of all)."""
    with _parquet(folder, file) as parquet:
        present = [name for name in columns.names if name in parquet.schema_arrow.names]
        batches = parquet.iter_batches(batch_size=_READ_ROWS, columns=present)
        yield from _records(_each(file, batches), file, columns, wanted)


def arrow_names(folder: Folder, file: TextFile) -> list[str]:
    """Return the names of the columns, by the schema at the beginning."""
    with _arrow(folder, file) as reader:
        return list(reader.schema.names)


def arrow_rows(folder: Folder, file: TextFile, columns: Columns) -> tuple[int, int]:
    """Return (rows, bytes of the columns); reads the whole file."""
    rows = size = 0
    with _arrow(folder, file) as reader:
        present = [index for index, name in enumerate(reader.schema.names) if name in columns.names]
        for batch in _each(file, iter(reader)):
            rows += batch.num_rows
            size += sum(batch.column(index).nbytes for index in present)
    return rows, size


def arrow_records(
    folder: Folder, file: TextFile, columns: Columns, wanted: np.ndarray | None
) -> Iterator[tuple[int, Record]]:
    """Yield (number in the file, record) where `wanted` is set (None: of all)."""
    with _arrow(folder, file) as reader:
        yield from _records(_each(file, iter(reader)), file, columns, wanted)


def parquet_classes(folder: Folder, file: TextFile, column: str) -> tuple[str, ...] | None:
    """Return the names of a column's classes, by number, where `datasets` wrote them into the footer; else None."""
    with _parquet(folder, file) as parquet:
        return _class_names(parquet.schema_arrow, column)


def arrow_classes(folder: Folder, file: TextFile, column: str) -> tuple[str, ...] | None:
    """Return the names of a column's classes, by number, where `datasets` wrote them into the schema; else None."""
    with _arrow(folder, file) as reader:
        return _class_names(reader.schema, column)


def _class_names(schema: Any, column: str) -> tuple[str, ...] | None:
    try:
        names = json.loads(schema.metadata[b"huggingface"])["info"]["features"][column]["names"]
    except (TypeError, KeyError, ValueError):
        return None
    return tuple(names) if isinstance(names, list) and all(isinstance(name, str) for name in names) else None


def _records(
    batches: Iterator[Any], file: TextFile, columns: Columns, wanted: np.ndarray | None
) -> Iterator[tuple[int, Record]]:
    first = 0
    for batch in batches:
        inside = np.ones(batch.num_rows, bool) if wanted is None else wanted[first : first + batch.num_rows]
        found = {name: batch.column(name) for name in columns.names if name in batch.schema.names}
        for row in np.flatnonzero(inside).tolist():
            place = Record(None, file.path, first + row)
            try:
                # One by one: `take` does not know every type that a file may hold.
                values = {name: column[row].as_py() for name, column in found.items()}
            except ValueError as error:  # text that is not UTF-8
                yield first + row, failed(place, f"cannot be read: {error}")
            else:
                yield first + row, columns.record(values, place)
        first += batch.num_rows


def _each(file: TextFile, batches: Iterator[Any]) -> Iterator[Any]:
    while (batch := _read(file, lambda: next(batches, None), "cannot be read")) is not None:
        yield batch


def _parquet(folder: Folder, file: TextFile) -> Any:
    import pyarrow.parquet as pq

    # Parquet compresses inside: no decompression by name here.
    return _read(file, lambda: pq.ParquetFile(folder.filesystem.open(file.path, "rb")), "is no readable Parquet file")


@contextmanager
def _arrow(folder: Folder, file: TextFile) -> Iterator[Any]:
    import pyarrow as pa

    with io.BufferedReader(folder.open(file.path)) as stream:

        def opened() -> Any:
            if stream.peek(len(_FILE_MARK)).startswith(_FILE_MARK):
                stream.read(len(_FILE_MARK))
            return pa.ipc.open_stream(stream)

        with _read(file, opened, "is no readable Arrow file") as reader:
            yield reader


def _read(file: TextFile, read: Callable[[], Any], what: str) -> Any:
    import pyarrow as pa

    try:
        return read()
    except (OSError, EOFError, pa.ArrowException) as error:
        raise DataError(f"data.path: {file.path} {what}: {error}", file=file.path) from error
