"""Documents in files: plain text (a file is a document), rows of JSON, CSV, TSV, Parquet or Arrow; texts or chats."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from cache_store.errors import DataError
from workers.data.files import files_fingerprint
from workers.data.text.corpora.base import Corpus, Record, text_of
from workers.data.text.corpora.conversations import conversation_of
from workers.data.text.corpora.files import Folder, Kind, TextFile, by_split, decoded, open_folder, text_files
from workers.data.text.corpora.layouts import chat_columns, turns_column
from workers.data.text.corpora.problems import Problems
from workers.data.text.corpora.rows import delimited, json_rows, tables
from workers.data.text.corpora.rows.columns import Columns, missing_column, text_column
from workers.specs.language import TextSpec

#: Sees a record before anything is planned. DataError when it cannot be used.
Check = Callable[[Record], object]

#: Rows that are looked at before anything is planned, of files that say how many they have; of others all are.
_CHECKED_ROWS = 256


@dataclass(frozen=True)
class Contents:
    """What the files of a data set hold: `kinds` of files, which `words` name, the columns of a document in a file
    that has these columns (DataError: they make none), the `check` of each document, and which files are of which of
    the data's own `splits`."""

    kinds: tuple[Kind, ...]
    words: str
    columns: Callable[[TextSpec, str, Sequence[str]], Columns]
    check: Check
    splits: Callable[[list[TextFile]], dict[str, list[TextFile]]] = by_split


def _text_columns(data: TextSpec, where: str, found: Sequence[str]) -> Columns:
    columns = text_column(data.column or (data.columns or {}).get("text", "text"))
    for name in columns.names:
        if name not in found:
            raise missing_column(where, name, found)
    return columns


def _chat_columns(data: TextSpec, where: str, found: Sequence[str]) -> Columns:
    if data.column is None:
        return chat_columns(where, found, data.columns or {}, data.system)
    if data.column not in found:
        raise missing_column(where, data.column, found)
    return turns_column(data.column, data.system)


ROWS: tuple[Kind, ...] = ("json", "csv", "tsv", "parquet", "arrow")
TEXTS = Contents(("plain", *ROWS), "plain text, JSON lines, CSV, TSV, Parquet or Arrow", _text_columns, text_of)
CHATS = Contents(ROWS, "JSON lines, CSV, TSV, Parquet or Arrow", _chat_columns, conversation_of)


@dataclass(frozen=True)
class _Reader:
    """How files of a kind are read. `names`: of their columns; `records`: (number in the file, record) where wanted,
    or of all; `rows`: (documents, bytes) without reading every one, None where that takes reading them; `classes`: the
    names of a column's classes, None where files of the kind bring none along."""

    names: Callable[[Folder, TextFile], Sequence[str]]
    records: Callable[[Folder, TextFile, Columns, np.ndarray | None], Iterator[tuple[int, Record]]]
    rows: Callable[[Folder, TextFile, Columns], tuple[int, int]] | None = None
    classes: Callable[[Folder, TextFile, str], tuple[str, ...] | None] | None = None


def _plain_record(
    folder: Folder, file: TextFile, columns: Columns, wanted: np.ndarray | None
) -> Iterator[tuple[int, Record]]:
    place = Record(None, file.path, 0)
    try:
        yield 0, place._replace(value=decoded(folder.read(file.path), file.path))
    except DataError as error:
        yield 0, place._replace(error=error)


_READERS: dict[Kind, _Reader] = {
    "plain": _Reader(lambda folder, file: ["text"], _plain_record, lambda folder, file, columns: (1, file.size)),
    "json": _Reader(json_rows.json_names, json_rows.json_records),
    "csv": _Reader(delimited.delimited_names, delimited.delimited_records),
    "tsv": _Reader(delimited.delimited_names, delimited.delimited_records),
    "parquet": _Reader(tables.parquet_names, tables.parquet_records, tables.parquet_rows, tables.parquet_classes),
    "arrow": _Reader(tables.arrow_names, tables.arrow_records, tables.arrow_rows, tables.arrow_classes),
}


class FileCorpus(Corpus):
    """Documents (or chat records) in files. DataError, all at once: nothing there, empty or unreadable files, columns
    that make no document, and the first rows of each file that cannot be used, unless `data.bad` skips those."""

    def __init__(self, data: TextSpec, contents: Contents) -> None:
        self._data = data
        self._contents = contents
        self._folder = open_folder(data, f"a file or folder of {contents.words}")
        found = text_files(self._folder, data.include, contents.kinds)
        if not found:
            patterns = ", ".join(data.include)
            raise DataError(f"data.path: no files of {contents.words} at {data.path}; data.include allows: {patterns}")
        self._files = contents.splits(found)
        self._columns: dict[str, Columns] = {}
        self._rows: dict[str, list[int]] = {}
        self.documents: dict[str, int] = {}
        self.bytes: dict[str, int] = {}
        problems = Problems(skip=data.bad == "skip")
        for split, files in self._files.items():
            counts = [self._counted(file, problems) for file in files]
            self._rows[split] = [rows for rows, _ in counts]
            self.documents[split] = sum(self._rows[split])
            self.bytes[split] = sum(size for _, size in counts)
            if not problems.said and not self.documents[split]:
                problems.file(f"data.path: no documents for {split} at {data.path}")
        problems.refuse()
        self.notes = problems.notes(sum(self.documents.values()))
        self.fingerprint = files_fingerprint(_how(data), sorted(self._files.items()))

    def _counted(self, file: TextFile, problems: Problems) -> tuple[int, int]:
        """Return documents and bytes of a file; what is wrong with it goes to `problems`."""
        try:
            return self._count(file, problems)
        except DataError as error:
            problems.file(error.message)
            return 0, 0

    def _count(self, file: TextFile, problems: Problems) -> tuple[int, int]:
        reader = _READERS[file.kind]
        names = reader.names(self._folder, file)
        # A file without a row says nothing of its columns.
        columns = self._contents.columns(self._data, file.path, names) if names else text_column("text")
        self._columns[file.path] = columns
        records = (record for _, record in reader.records(self._folder, file, columns, None))
        if reader.rows is None:
            rows = sum(self._checked(file, record, problems) for record in records)
            return rows, file.size
        rows, size = reader.rows(self._folder, file, columns)
        if file.kind in ROWS:
            for record in itertools.islice(records, _CHECKED_ROWS):
                self._checked(file, record, problems)
        return rows, size

    def _checked(self, file: TextFile, record: Record, problems: Problems) -> int:
        """Check one row; 1."""
        error = record.error
        if error is None:
            try:
                self._contents.check(record)
            except DataError as found:
                error = found
        if error is not None:
            problems.row(file.path, error.message)
        return 1

    def counts_rows(self, file: TextFile) -> bool:
        """Tell whether a file says how many rows it has, so that not all of them have been looked at."""
        return _READERS[file.kind].rows is not None

    def class_names(self, file: TextFile, column: str) -> tuple[str, ...] | None:
        """The names that a file brings along for the classes in a column; None where it does not."""
        own = _READERS[file.kind].classes
        return None if own is None else own(self._folder, file, column)

    def read(self, file: TextFile, columns: Columns) -> Iterator[Record]:
        """Yield all rows of a file, of these columns."""
        yield from (record for _, record in _READERS[file.kind].records(self._folder, file, columns, None))

    def records(self, split: str, wanted: np.ndarray) -> Iterator[tuple[int, Record]]:
        """See `Corpus`."""
        first = 0
        for file, rows in zip(self._files[split], self._rows[split], strict=True):
            mine = wanted[first : first + rows]
            if mine.any():
                columns = self._columns[file.path]
                for row, record in _READERS[file.kind].records(self._folder, file, columns, mine):
                    yield first + row, record
            first += rows


def _how(data: TextSpec) -> str:
    """How files are read, as far as it is not plain from them."""
    named = sorted((data.columns or {}).items())
    return " ".join([data.name, str(data.column), *([json.dumps(named)] if named else [])])
