"""Rows of CSV and TSV: fields in quotes may hold separators and line breaks, and the first row names the columns."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator

import numpy as np

from cache_store.errors import DataError
from workers.data.text.corpora.base import Record, failed
from workers.data.text.corpora.files import Folder, TextFile
from workers.data.text.corpora.rows.columns import Columns

_SEPARATORS = {"csv": ",", "tsv": "\t"}
#: Longest field in characters; beyond it a quote was left open. Python's own limit would be 128 Ki for every reader of
#: the process.
_LONGEST_FIELD = 64 << 20


def delimited_names(folder: Folder, file: TextFile) -> list[str]:
    """Return the names in the first row."""
    return next(_rows(folder, file), [])


def delimited_records(
    folder: Folder, file: TextFile, columns: Columns, wanted: np.ndarray | None
) -> Iterator[tuple[int, Record]]:
    """Yield (number in the file, record) where `wanted` is set (None: of all). All values are texts. Empty lines are no
    rows; one with more or fewer fields than the first cannot be read."""
    rows = _rows(folder, file)
    names = next(rows, [])
    for number, fields in enumerate(rows):
        if wanted is not None and number >= len(wanted):
            raise DataError(f"{file.path} has grown while it was read; run again", file=file.path)
        if wanted is None or wanted[number]:
            place = Record(None, file.path, number)
            if len(fields) != len(names):
                what = f"{len(fields)} fields instead of the {len(names)} of the first line; quotes keep separators"
                yield number, failed(place, what)
            else:
                yield number, columns.record(dict(zip(names, fields, strict=True)), place)


def _rows(folder: Folder, file: TextFile) -> Iterator[list[str]]:
    """Yield the fields of every row that has some. DataError, naming the line: not UTF-8, or a quote left open."""
    csv.field_size_limit(_LONGEST_FIELD)
    with folder.open(file.path) as stream, io.TextIOWrapper(stream, encoding="utf-8-sig", newline="") as text:
        reader = csv.reader(text, delimiter=_SEPARATORS[file.kind], strict=True)
        while True:
            try:
                fields = next(reader, None)
            except (csv.Error, ValueError, OSError, EOFError) as error:
                where = f"{file.path} cannot be read behind line {reader.line_num}"
                raise DataError(f"data.path: {where}: {error}", file=file.path) from error
            if fields is None:
                return
            if fields:
                yield fields
