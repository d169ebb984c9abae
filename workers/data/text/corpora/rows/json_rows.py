"""Rows of JSON: a line each, or the objects of one array."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from typing import Any

import numpy as np

from cache_store.errors import DataError
from workers.data.text.corpora.base import Record, failed
from workers.data.text.corpora.files import Folder, TextFile, readable
from workers.data.text.corpora.rows.columns import Columns

#: Rows whose keys are taken for the columns of a file.
_LOOKED_AT = 100
_MARK = b"\xef\xbb\xbf"


def json_names(folder: Folder, file: TextFile) -> list[str]:
    """Return the keys of the first rows; of a file without one, none."""
    names: dict[str, None] = {}
    for _, row in itertools.islice(_rows(folder, file), _LOOKED_AT):
        parsed, _ = _parsed(row)
        names.update(dict.fromkeys(parsed if isinstance(parsed, dict) else ()))
    return list(names)


def json_records(
    folder: Folder, file: TextFile, columns: Columns, wanted: np.ndarray | None
) -> Iterator[tuple[int, Record]]:
    """Yield (number in the file, record) where `wanted` is set (None: of all); other lines are not parsed. Blank lines
    are no rows."""
    for number, row in _rows(folder, file):
        if wanted is not None and number >= len(wanted):
            raise DataError(f"{file.path} has grown while it was read; run again", file=file.path)
        if wanted is None or wanted[number]:
            place = Record(None, file.path, number)
            parsed, wrong = _parsed(row)
            yield number, columns.record(parsed, place) if wrong is None else failed(place, wrong)


def _rows(folder: Folder, file: TextFile) -> Iterator[tuple[int, Any]]:
    """Yield (number, line with its number, or object) of every row."""
    if _is_array(folder, file):
        try:
            yield from enumerate(json.loads(folder.read(file.path).removeprefix(_MARK)))
        except (ValueError, RecursionError) as error:
            raise DataError(f"{file.path} is not JSON: {error}", file=file.path) from error
        return
    with folder.open(file.path) as stream:
        row = 0
        lines = iter(stream)
        for number in itertools.count(1):
            line = readable(file.path, lambda: next(lines, None))
            if line is None:
                return
            text = line.removeprefix(_MARK) if number == 1 else line
            if text.strip():
                yield row, (text, number)
                row += 1


def _is_array(folder: Folder, file: TextFile) -> bool:
    with folder.open(file.path) as stream:
        head: bytes = readable(file.path, lambda: stream.read(4096))
    return head.removeprefix(_MARK).lstrip().startswith(b"[")


def _parsed(row: Any) -> tuple[Any, str | None]:
    """Return what a row holds; or why it holds nothing."""
    if not isinstance(row, tuple):
        return row, None
    text, number = row
    try:
        return json.loads(text), None
    except (ValueError, RecursionError) as error:
        what = f"{error.msg}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
        return None, f"not JSON in line {number}: {what}"
