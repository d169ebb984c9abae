"""What a document is before it is tokenized, and what holds documents: `Record`, `Corpus`."""

from __future__ import annotations

import abc
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from cache_store.errors import DataError

#: Splits in the order in which they are prepared.
SPLITS = ("train", "validation", "test")
#: Goes into the identity of all prepared text. Raised with whatever changes the tokens or targets of the same files.
FORMAT = 3

#: Bytes of text a token, about: for estimates before anything is tokenized.
BYTES_PER_TOKEN = 4


class Record(NamedTuple):
    """One document: `value` is a text, a list of messages or a `Question`; `file` and `row` (from 0) say where. `error`
    says why there is no value, where a row cannot be read."""

    value: Any
    file: str
    row: int
    error: DataError | None = None


class Corpus(abc.ABC):
    """The documents of a data set in their own splits: `train` always, others where the data has them. Making one finds
    and counts them. DataError, all problems at once, when there are none, or none that can be read."""

    #: sha256 (hex): changes with the documents.
    fingerprint: str
    #: Documents and (about) bytes of text of every split that the data itself has.
    documents: dict[str, int]
    bytes: dict[str, int]
    #: What the splits are made of where that is not what one expects, in words.
    notes: tuple[str, ...] = ()

    @abc.abstractmethod
    def records(self, split: str, wanted: np.ndarray) -> Iterator[tuple[int, Record]]:
        """Yield (number, record) of the documents of one of the data's own splits, in order, where `wanted` (bool, one
        a document) is set. A row that cannot be read is a record with an `error`. DataError for a file that cannot
        be."""

    def draw_shots(self, trained: np.ndarray, seed: int) -> None:  # noqa: B027  most take none from there
        """Choose the examples shown before questions from these documents of `train` (int64 numbers), where a data set
        takes them from there. ConfigError when there are too few."""


def text_of(record: Record) -> str:
    """Return a document's text; "" for none. DataError when it is something else."""
    if record.value is not None and not isinstance(record.value, str):
        raise broken(record, f"{type(record.value).__name__} instead of a text")
    return record.value or ""


def clean(text: str) -> str:
    """Replace lone surrogates (which JSON can hold and UTF-8 cannot) by '?'."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode(errors="replace").decode()
    return text


def broken(record: Record, what: str) -> DataError:
    """Return the error for one document; its details say where, and `what`."""
    return DataError(f"row {record.row} of {record.file}: {what}", file=record.file, row=record.row, what=what)


def failed(record: Record, what: str) -> Record:
    """Return the record of a row that cannot be read."""
    return record._replace(value=None, error=broken(record, what))
