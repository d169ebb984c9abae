"""Documents in files: plain text (a file is a document), JSON lines, Parquet; and Python's own standard library."""

from __future__ import annotations

import hashlib
import itertools
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cache_store.errors import DataError
from workers.data.text.corpora.base import Corpus, Record, text_of
from workers.data.text.corpora.columns import json_records, json_rows, parquet_records, parquet_rows
from workers.data.text.corpora.conversations import conversation_of
from workers.data.text.corpora.files import Folder, Kind, TextFile, by_split, open_folder, stamps, text_files
from workers.specs.language import TextSpec

#: Sees a record before anything is planned. DataError when it cannot be used.
Check = Callable[[Record], object]

#: Rows of a Parquet file that are looked at before anything is planned; of JSON all are.
_CHECKED_ROWS = 256
#: Folders of the standard library that are not it, or are the tests of it.
_NOT_STDLIB = ("site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__")


@dataclass(frozen=True)
class Contents:
    """What the files of a data set hold: `kinds` of files, which `words` name, the column of documents in those that
    have columns, and the `check` of each document."""

    kinds: tuple[Kind, ...]
    words: str
    column: str
    check: Check


TEXTS = Contents(("plain", "json", "parquet"), "plain text, JSON lines or Parquet", "text", text_of)
CHATS = Contents(("json", "parquet"), "JSON lines or Parquet", "messages", conversation_of)


@dataclass(frozen=True)
class _Reader:
    """How files of a kind are read: `count` checks records and gives documents and bytes, `records` (number in the
    file, record)."""

    count: Callable[[Folder, TextFile, str, Check], tuple[int, int]]
    records: Callable[[Folder, TextFile, str, np.ndarray], Iterator[tuple[int, Record]]]


def _count_plain(folder: Folder, file: TextFile, column: str, check: Check) -> tuple[int, int]:
    return 1, file.size


def _plain_record(folder: Folder, file: TextFile, column: str, wanted: np.ndarray) -> Iterator[tuple[int, Record]]:
    yield 0, Record(decoded(folder.read(file.path), file.path), file.path, 0)


def _count_json(folder: Folder, file: TextFile, column: str, check: Check) -> tuple[int, int]:
    return json_rows(folder, file, column, check), file.size


def _count_parquet(folder: Folder, file: TextFile, column: str, check: Check) -> tuple[int, int]:
    rows, size = parquet_rows(folder, file, column)
    everything = np.ones(rows, bool)
    for _, record in itertools.islice(parquet_records(folder, file, column, everything), _CHECKED_ROWS):
        check(record)
    return rows, size


_READERS: dict[Kind, _Reader] = {
    "plain": _Reader(_count_plain, _plain_record),
    "json": _Reader(_count_json, json_records),
    "parquet": _Reader(_count_parquet, parquet_records),
}


class FileCorpus(Corpus):
    """Documents (or chat records) in files. DataError, all at once: nothing there, empty or unreadable files, no
    such column, and the first of each file's records that is none."""

    def __init__(self, data: TextSpec, contents: Contents) -> None:
        self._check = contents.check
        self._column = data.column or contents.column
        self._folder = open_folder(data, f"a file or folder of {contents.words}")
        found = text_files(self._folder, data.include, contents.kinds)
        if not found:
            patterns = ", ".join(data.include)
            raise DataError(f"data.path: no files of {contents.words} at {data.path}; data.include allows: {patterns}")
        self._files = by_split(found)
        self._rows: dict[str, list[int]] = {}
        self.documents: dict[str, int] = {}
        self.bytes: dict[str, int] = {}
        problems = []
        for split, files in self._files.items():
            counts = []
            for file in files:
                try:
                    counts.append(self._count(file))
                except DataError as error:
                    problems.append(error.message)
            self._rows[split] = [rows for rows, _ in counts]
            self.documents[split] = sum(self._rows[split])
            self.bytes[split] = sum(size for _, size in counts)
            if not problems and not self.documents[split]:
                problems.append(f"data.path: no documents for {split} at {data.path}")
        if problems:
            raise DataError("\n".join(problems), problems=problems)
        self.fingerprint = stamps(f"{data.name} {self._column}", self._files)

    def _count(self, file: TextFile) -> tuple[int, int]:
        return _READERS[file.kind].count(self._folder, file, self._column, self._check)

    def records(self, split: str, wanted: np.ndarray) -> Iterator[tuple[int, Record]]:
        """See `Corpus`."""
        first = 0
        for file, rows in zip(self._files[split], self._rows[split], strict=True):
            mine = wanted[first : first + rows]
            if mine.any():
                for row, record in self._read(file, mine):
                    yield first + row, record
            first += rows

    def _read(self, file: TextFile, wanted: np.ndarray) -> Iterator[tuple[int, Record]]:
        return _READERS[file.kind].records(self._folder, file, self._column, wanted)


def decoded(data: bytes, path: str) -> str:
    """UTF-8 text, its byte order mark removed. DataError with the place when it is not UTF-8."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: byte {error.start} is not UTF-8: {error.reason}", file=path) from error


class StdlibCorpus(Corpus):
    """The modules of this Python's standard library, tests and installed packages left out: text that every machine
    has. The fingerprint covers what they say, not where they lie."""

    def __init__(self, data: TextSpec) -> None:
        if data.path is not None:
            raise DataError(f"data.path: {data.path}: stdlib takes none; allowed: null (or data.name: text)")
        self._root = Path(sysconfig.get_path("stdlib"))
        names = []
        for path in self._root.rglob("*.py"):
            relative = path.relative_to(self._root)
            # _sysconfigdata is written by the build of this very Python: it differs from machine to machine.
            if not set(relative.parts) & set(_NOT_STDLIB) and not path.name.startswith("_sysconfigdata"):
                names.append(relative.as_posix())
        self._names = sorted(names)
        if not names:
            raise DataError(f"data.name: stdlib: this Python has no sources under {self._root}; allowed: text")
        digest = hashlib.sha256(b"stdlib")
        size = 0
        for name in self._names:
            content = self._content(name)
            size += len(content)
            digest.update(f"\x1e{name}\x1f{len(content)}\x1f".encode())
            digest.update(content)
        self.fingerprint = digest.hexdigest()
        self.documents = {"train": len(self._names)}
        self.bytes = {"train": size}

    def _content(self, name: str) -> bytes:
        try:
            return (self._root / name).read_bytes()
        except OSError as error:
            raise DataError(f"data.name: stdlib: {self._root / name} cannot be read: {error}") from error

    def records(self, split: str, wanted: np.ndarray) -> Iterator[tuple[int, Record]]:
        """See `Corpus`. The few sources in another encoding keep what is ASCII in them."""
        for number in np.flatnonzero(wanted).tolist():
            name = self._names[number]
            yield number, Record(self._content(name).decode("utf-8", errors="replace"), name, 0)
