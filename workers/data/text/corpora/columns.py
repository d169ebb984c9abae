"""JSON lines and Parquet: counting rows, finding the column that holds the documents, reading it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from cache_store.errors import DataError
from cache_store.suggest import did_you_mean
from workers.data.text.corpora.base import Record, broken
from workers.data.text.corpora.files import Folder, TextFile, readable

_READ_ROWS = 1024
_MARK = b"\xef\xbb\xbf"


def missing_column(where: str, column: str, found: Iterable[str]) -> DataError:
    """The error for a column that is not there, with the nearest one that is."""
    names = [str(name) for name in found]
    hint = did_you_mean(column, names, cutoff=0.5)
    return DataError(
        f"data.column: {where} has no {column!r}{hint} (it has {', '.join(names) or 'none'})", column=column
    )


def json_rows(folder: Folder, file: TextFile, column: str, check: Callable[[Record], object]) -> int:
    """Count records in a file of JSON lines (blank lines are none) or in a JSON array. `check` sees every record.
    DataError when one is not an object with `column`, naming its line."""
    rows = 0
    for row, line in _json_lines(folder, file):
        check(Record(_value(line, file, row, column), file.path, row))
        rows += 1
    return rows


def json_records(folder: Folder, file: TextFile, column: str, wanted: np.ndarray) -> Iterator[tuple[int, Record]]:
    """(number in the file, record) where `wanted` is set; other lines are not parsed."""
    for row, line in _json_lines(folder, file):
        if row >= len(wanted):
            raise DataError(f"{file.path} has grown while it was read; run again", file=file.path)
        if wanted[row]:
            yield row, Record(_value(line, file, row, column), file.path, row)


class _Line(NamedTuple):
    text: bytes
    number: int


def _json_lines(folder: Folder, file: TextFile) -> Iterator[tuple[int, Any]]:
    """(number, `_Line` or object) of every record."""
    with folder.open(file.path) as stream:
        if _is_array(stream, file):
            try:
                yield from enumerate(json.loads(readable(file.path, stream.read)))
            except ValueError as error:
                raise DataError(f"{file.path} is not JSON: {error}", file=file.path) from error
            return
        row = number = 0
        lines = iter(stream)
        while (line := readable(file.path, lambda: next(lines, None))) is not None:
            number += 1
            text = line.removeprefix(_MARK) if number == 1 else line
            if text.strip():
                yield row, _Line(text, number)
                row += 1


def _is_array(stream: Any, file: TextFile) -> bool:
    head = readable(file.path, lambda: stream.read(4096))
    readable(file.path, lambda: stream.seek(0))
    return bool(head.removeprefix(_MARK).lstrip().startswith(b"["))


def _value(line: Any, file: TextFile, row: int, column: str) -> Any:
    record = Record(None, file.path, row)
    if isinstance(line, _Line):
        number = line.number
        try:
            line = json.loads(line.text)
        except (ValueError, RecursionError) as error:
            what = f"{error.msg}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
            raise broken(record, f"not JSON in line {number}: {what}") from error
    if not isinstance(line, dict):
        raise broken(record, f"a {type(line).__name__} instead of a JSON object")
    if column not in line:
        raise missing_column(f"row {row} of {file.path}", column, line)
    return line[column]


def parquet_rows(folder: Folder, file: TextFile, column: str) -> tuple[int, int]:
    """(rows, bytes of `column` uncompressed) by the footer. DataError when it is none or lacks the column."""
    with _parquet(folder, file) as parquet:
        if column not in parquet.schema_arrow.names:
            raise missing_column(file.path, column, parquet.schema_arrow.names)
        size = 0
        for group in range(parquet.num_row_groups):
            columns = parquet.metadata.row_group(group)
            for index in range(columns.num_columns):
                if columns.column(index).path_in_schema.split(".")[0] == column:
                    size += columns.column(index).total_uncompressed_size
        return int(parquet.metadata.num_rows), size


def parquet_records(folder: Folder, file: TextFile, column: str, wanted: np.ndarray) -> Iterator[tuple[int, Record]]:
    """(number in the file, record) where `wanted` is set, a bounded number of rows in memory."""
    import pyarrow as pa

    with _parquet(folder, file) as parquet:
        first = 0
        batches = parquet.iter_batches(batch_size=_READ_ROWS, columns=[column])
        while True:
            try:
                batch = next(batches, None)
            except (OSError, pa.ArrowException) as error:
                raise DataError(f"data.path: {file.path} cannot be read: {error}", file=file.path) from error
            if batch is None:
                return
            rows = np.flatnonzero(wanted[first : first + batch.num_rows])
            for row in rows.tolist():
                yield first + row, _parquet_value(batch.column(0), row, Record(None, file.path, first + row))
            first += batch.num_rows


def _parquet_value(column: Any, row: int, record: Record) -> Record:
    # One by one: `take` does not know every type that a file may hold.
    try:
        return record._replace(value=column[row].as_py())
    except ValueError as error:  # text that is not UTF-8
        raise broken(record, f"cannot be read: {error}") from error


def _parquet(folder: Folder, file: TextFile) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        # Parquet compresses inside: no decompression by name here.
        return pq.ParquetFile(folder.filesystem.open(file.path, "rb"))
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"data.path: {file.path} is no readable Parquet file: {error}", file=file.path) from error
