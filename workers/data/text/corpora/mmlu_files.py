"""The files of MMLU: CSV as published, or Parquet as the hub's cais/mmlu has it."""

from __future__ import annotations

import csv
import hashlib
import io
import re
from collections.abc import Iterable, Mapping
from typing import Any

from cache_store.errors import DataError
from workers.data.text.corpora.base import Record, broken
from workers.data.text.corpora.files import Folder, decoded
from workers.data.text.corpora.questions import Candidate, Question
from workers.data.text.corpora.rows.columns import missing_column

#: What the files call a split, in CSV and in Parquet.
_NAMES = {"dev": ("dev",), "val": ("val", "validation"), "test": ("test",)}
_LETTERS = "ABCD"
_COLUMNS = ("question", "choices", "answer")
TRAINING = "auxiliary_train"


class MMLUFiles:
    """The questions of a folder, by split and subject. What has been read is in `fingerprint`."""

    def __init__(self, folder: Folder) -> None:
        self._folder = folder
        self._digest = hashlib.sha256(b"mmlu 2")

    @property
    def fingerprint(self) -> str:
        """sha256 (hex) of everything that was read so far, in order."""
        return self._digest.hexdigest()

    def training(self) -> list[Record]:
        """Read the questions to train on; none where the folder has no such files."""
        paths = self._list(TRAINING, r".+\.csv") or self._list(TRAINING, r".+\.parquet")
        paths = paths or self._list("all", rf"{TRAINING}[-.].*parquet")
        return [record for path in paths for record in self._records(path, TRAINING)]

    def subjects(self, split: str) -> list[str]:
        """List the subjects that have questions in a split (dev, val or test)."""
        found = self._by_subject(split)
        if not found:
            found = {subject: [] for subject in self._mixed(split)}
        return sorted(found)

    def questions(self, split: str, subjects: Iterable[str]) -> dict[str, list[Record]]:
        """Read the questions of a split, by subject, of those of the subjects that it has."""
        files = self._by_subject(split)
        if not files:
            mixed = self._mixed(split)
            return {subject: mixed[subject] for subject in subjects if subject in mixed}
        return {
            subject: [record for path in files[subject] for record in self._records(path, f"{split} {subject}")]
            for subject in subjects
            if subject in files
        }

    def _by_subject(self, split: str) -> dict[str, list[str]]:
        """Paths of the files that hold one subject's questions of a split each, by subject."""
        found: dict[str, list[str]] = {}
        for path in self._list(split, rf".+_{split}\.csv"):
            found[path.rsplit("/", 1)[-1].removesuffix(f"_{split}.csv")] = [path]
        if found:
            return found
        pattern = rf"({'|'.join(_NAMES[split])})[-.].*parquet"
        for subject in self._folders():
            if subject not in ("all", TRAINING) and (paths := self._list(subject, pattern)):
                found[subject] = paths
        return found

    def _mixed(self, split: str) -> dict[str, list[Record]]:
        """Read files that hold the questions of all subjects."""
        found: dict[str, list[Record]] = {}
        for path in self._list("all", rf"({'|'.join(_NAMES[split])})[-.].*parquet"):
            content = self._content(path, split)
            for number, row in enumerate(_parquet_rows(content, path)):
                place = Record(None, path, number)
                if not isinstance(row.get("subject"), str):
                    raise missing_column(f"row {number} of {path}", "subject", row)
                found.setdefault(row["subject"], []).append(place._replace(value=_from_columns(row, place)))
        return found

    def _records(self, path: str, what: str) -> list[Record]:
        content = self._content(path, what)
        if path.endswith(".csv"):
            return _csv_records(content, path)
        places = ((row, Record(None, path, number)) for number, row in enumerate(_parquet_rows(content, path)))
        return [place._replace(value=_from_columns(row, place)) for row, place in places]

    def _content(self, path: str, what: str) -> bytes:
        content = self._folder.read(path)
        self._digest.update(f"\x1e{what}\x1f{len(content)}\x1f".encode())
        self._digest.update(content)
        return content

    def _list(self, name: str, pattern: str) -> list[str]:
        """Paths of the files of a folder whose names match, sorted."""
        try:
            paths = sorted(
                map(str, self._folder.filesystem.ls(f"{self._folder.root.rstrip('/')}/{name}", detail=False))
            )
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            raise DataError(f"data.path: cannot list {self._folder.root}/{name}: {error}") from error
        return [path for path in paths if re.fullmatch(pattern, path.rsplit("/", 1)[-1])]

    def _folders(self) -> list[str]:
        try:
            infos = self._folder.filesystem.ls(self._folder.root, detail=True)
        except OSError as error:
            raise DataError(f"data.path: cannot list {self._folder.root}: {error}") from error
        return sorted(str(info["name"]).rstrip("/").rsplit("/", 1)[-1] for info in infos if info["type"] == "directory")


def _csv_records(content: bytes, path: str) -> list[Record]:
    """Read questions with or without a header, with answers A to D or 0 to 3."""
    try:
        rows = list(csv.reader(io.StringIO(decoded(content, path), newline=""), strict=True))
    except csv.Error as error:
        raise DataError(f"{path} is no CSV file: {error}", file=path) from error
    if rows and rows[0][:1] == ["question"] and rows[0][-1] == "answer":
        rows = rows[1:]
    return [Record(_from_row(row, Record(None, path, number)), path, number) for number, row in enumerate(rows)]


def _from_row(row: list[str], place: Record) -> Question:
    if len(row) != 6:
        raise broken(place, f"{len(row)} columns; allowed: question, four choices, answer")
    question, *choices, answer = row
    correct = _LETTERS.find(answer) if answer in tuple(_LETTERS) else int(answer) if answer in tuple("0123") else -1
    if correct < 0:
        raise broken(place, f"the answer is {answer!r}; allowed: 0 to 3, or A to D")
    return _question(question, choices, correct)


def _parquet_rows(content: bytes, path: str) -> list[Mapping[str, Any]]:
    """Read a whole Parquet file. The hub's auxiliary_train has its columns inside one called `train`."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        rows: list[Mapping[str, Any]] = pq.read_table(pa.BufferReader(content)).to_pylist()
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"data.path: {path} is no readable Parquet file: {error}", file=path) from error
    return [row["train"] if isinstance(row.get("train"), dict) else row for row in rows]


def _from_columns(row: Mapping[str, Any], place: Record) -> Question:
    for column in _COLUMNS:
        if column not in row:
            raise missing_column(f"row {place.row} of {place.file}", column, row)
    question, choices, answer = (row[column] for column in _COLUMNS)
    if not isinstance(question, str):
        raise broken(place, f"question is {question!r}; allowed: a text")
    if not isinstance(choices, list) or len(choices) != 4 or not all(isinstance(choice, str) for choice in choices):
        raise broken(place, f"choices are {choices!r}; allowed: four texts")
    if answer not in (0, 1, 2, 3):
        raise broken(place, f"the answer is {answer!r}; allowed: 0 to 3")
    return _question(question, choices, int(answer))


def _question(question: str, choices: list[str], correct: int) -> Question:
    lines = "".join(f"\n{letter}. {choice}" for letter, choice in zip(_LETTERS, choices, strict=True))
    context = f"{question.strip()}{lines}\nAnswer:"
    candidates = tuple(Candidate(context, f" {letter}") for letter in _LETTERS)
    return Question(candidates, correct, "\n".join((question, *choices)))
