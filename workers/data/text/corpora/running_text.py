"""Documents in files: plain text (a file is a document), JSON lines, Parquet; and Python's own standard library."""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from cache_store.errors import DataError
from workers.data.text.corpora.base import Record
from workers.data.text.corpora.columns import json_records, json_rows, parquet_records, parquet_rows
from workers.data.text.corpora.files import Kind, TextFile, by_split, open_folder, stamps, text_files
from workers.specs.language import TextSpec

#: Folders of the standard library that are not it, or are the tests of it.
_NOT_STDLIB = ("site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__")


class FileCorpus:
    """Documents (or chat records) in files. DataError, all at once: nothing there, empty or unreadable files, no
    such column."""

    def __init__(self, data: TextSpec) -> None:
        self.running = data.name == "text"
        kinds: tuple[Kind, ...] = ("plain", "json", "parquet") if self.running else ("json", "parquet")
        what = "plain text, JSON lines or Parquet" if self.running else "JSON lines or Parquet"
        self._column = data.column or ("text" if self.running else "messages")
        self._folder = open_folder(data, f"a file or folder of {what}")
        found = text_files(self._folder, data.include, kinds)
        if not found:
            patterns = ", ".join(data.include)
            raise DataError(f"data.path: no files of {what} at {data.path}; data.include allows: {patterns}")
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
        if file.kind == "plain":
            return 1, file.size
        if file.kind == "json":
            return json_rows(self._folder, file, self._column), file.size
        return parquet_rows(self._folder, file, self._column)

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
        if file.kind == "json":
            return json_records(self._folder, file, self._column, wanted)
        if file.kind == "parquet":
            return parquet_records(self._folder, file, self._column, wanted)
        return iter([(0, Record(decoded(self._folder.read(file.path), file.path), file.path, 0))])


def decoded(data: bytes, path: str) -> str:
    """UTF-8 text, its byte order mark removed. DataError with the place when it is not UTF-8."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: byte {error.start} is not UTF-8: {error.reason}", file=path) from error


class StdlibCorpus:
    """The modules of this Python's standard library, tests and installed packages left out: text that every machine
    has. The fingerprint covers what they say, not where they lie."""

    running = True

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
