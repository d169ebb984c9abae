"""What a document is before it is tokenized, and what holds documents: `Record`, `Corpus`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

import numpy as np

from cache_store.errors import DataError

#: Splits in the order in which they are prepared.
SPLITS = ("train", "validation", "test")


class Record(NamedTuple):
    """One document: `value` is a text, a list of messages or a `Question`; `file` and `row` (from 0) say where."""

    value: Any
    file: str
    row: int


class Corpus(Protocol):
    """The documents of a data set in their own splits: `train` always, others where the data has them."""

    #: sha256 (hex): changes with the documents.
    fingerprint: str
    #: Documents and (about) bytes of text of every split that the data itself has.
    documents: dict[str, int]
    bytes: dict[str, int]
    #: Whether documents are running text, which may be packed.
    running: bool

    def records(self, split: str, wanted: np.ndarray) -> Iterator[tuple[int, Record]]:
        """(number, record) of the documents of one of the data's own splits, in order, where `wanted` (bool, one a
        document) is set. DataError, with file and row, for what cannot be read."""


def broken(record: Record, what: str) -> DataError:
    """The error for one document."""
    return DataError(f"row {record.row} of {record.file}: {what}", file=record.file, row=record.row)
