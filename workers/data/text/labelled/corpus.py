"""Labelled text in files: found, split and counted as text is, with the classes that its labels make."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch

from cache_store.errors import DataError
from workers.data.text.corpora.base import SPLITS, Record
from workers.data.text.corpora.file_corpus import ROWS, Contents, FileCorpus
from workers.data.text.corpora.files import TextFile, by_split
from workers.data.text.corpora.rows.columns import Columns
from workers.data.text.labelled.rows import (
    MOST_CLASSES,
    Classes,
    Labelled,
    label_of,
    labelled_columns,
    sorted_labels,
    texts_of,
)
from workers.data.text.splits import split_documents
from workers.specs.language import LabelledTextSpec, TextSpec

#: Goes into the identity of all prepared labelled text. Raised with what changes tokens or labels of the same files.
FORMAT = 1


class LabelledCorpus(FileCorpus):
    """Rows in files, and their `classes`. DataError, all at once: as `FileCorpus`, with rows that have no text, no
    label, or an unknown one; fewer than two classes, or too many."""

    def __init__(self, data: LabelledTextSpec) -> None:
        self._spec = data
        self._labels: set[str] = set()
        self._known = None if data.labels is None else Classes(data.labels, given=True)
        contents = Contents(
            kinds=ROWS,
            words="JSON lines, CSV, TSV, Parquet or Arrow",
            columns=_columns,
            check=self._check,
            splits=self._by_split,
        )
        super().__init__(data.as_text(), contents)
        self.classes = self._known or self._named() or self._all()
        if len(self.classes.names) < 2:
            raise DataError(f"data.path: all rows at {data.path} are of one class, {self.classes.names[0]!r}")
        how = json.dumps([self.classes.names, data.files], sort_keys=True)
        self.fingerprint = hashlib.sha256(f"{self.fingerprint} {how}".encode()).hexdigest()

    def _check(self, record: Record) -> None:
        """Check a row, and note its label."""
        texts_of(record)
        if self._known is not None:
            self._known.number(record)
        else:
            self._noted(label_of(record))

    def _noted(self, label: str) -> None:
        self._labels.add(label)
        if len(self._labels) > MOST_CLASSES:
            raise DataError(
                f"data.columns.label: more than {MOST_CLASSES} different labels at {self._spec.path}; is that column "
                "what a row is of?"
            )

    def _by_split(self, found: list[TextFile]) -> dict[str, list[TextFile]]:
        patterns = self._spec.files
        if patterns is None:
            return by_split(found)
        named: dict[str, list[TextFile]] = {
            split: [file for file in found if _matches(file, patterns[split])] for split in SPLITS if split in patterns
        }
        missing = [f"{split}: {patterns[split]}" for split, files in named.items() if not files]
        if missing or "train" not in named:
            what = f"no files for {', '.join(missing)}" if missing else "none given for train"
            raise DataError(f"data.files: {what} at {self._spec.path} (it has {', '.join(f.name for f in found[:6])})")
        return named

    def _named(self) -> Classes | None:
        """The classes that files of the hub name, all of them alike; None where they do not."""
        found = {self.class_names(file, self._label(file)) for file in self._every()}
        names = found.pop() if len(found) == 1 else None
        return None if names is None else Classes(names, given=True)

    def _all(self) -> Classes:
        """The classes of all labels that there are. Files that say how many rows they have were not read to the end."""
        for file in self._every():
            if self.counts_rows(file):
                column = {"label": self._label(file)}
                label = Columns(column, lambda row: Labelled("", None, row["label"], paired=False))
                for record in self.read(file, label):
                    self._take(record)
        return Classes(sorted_labels(self._labels), given=False)

    def _take(self, record: Record) -> None:
        try:
            label = label_of(record)
        except DataError:
            if self._spec.bad == "refuse":
                raise
            return
        self._noted(label)

    def _every(self) -> Iterator[TextFile]:
        yield from (file for files in self._files.values() for file in files)

    def _label(self, file: TextFile) -> str:
        # A file without a row says nothing of its columns.
        return self._columns[file.path].needed.get("label", "label")


def _columns(data: TextSpec, where: str, found: Sequence[str]) -> Columns:
    return labelled_columns(where, found, data.columns or {})


def _matches(file: TextFile, pattern: str) -> bool:
    return fnmatch(file.name, pattern) or fnmatch(file.name.rsplit("/", 1)[-1], pattern)


@dataclass(frozen=True)
class LabelledOutline:
    """A labelled data set in figures: rows of each split, bytes of all, a fingerprint (sha256, hex) that changes with
    the rows and with how they become samples, what the splits are made of where that is not what one expects, and the
    names of the classes."""

    rows: dict[str, int]
    bytes: int
    fingerprint: str
    notes: tuple[str, ...]
    class_names: tuple[str, ...]


def inspect_labelled(data: LabelledTextSpec, seed: int = 0) -> LabelledOutline:
    """Describe a labelled data set. Errors as `LabelledCorpus`, and ConfigError for a split without rows."""
    corpus = LabelledCorpus(data)
    parts = split_documents(data.as_text(), seed, corpus.documents)
    return LabelledOutline(
        rows={split: len(parts[split][1]) for split in SPLITS},
        bytes=sum(corpus.bytes.values()),
        fingerprint=fingerprint_of(corpus),
        notes=corpus.notes,
        class_names=corpus.classes.names,
    )


def fingerprint_of(corpus: LabelledCorpus) -> str:
    """Return the fingerprint of a data set as nodes of a plan hold it."""
    return hashlib.sha256(f"labelled {FORMAT} {corpus.fingerprint}".encode()).hexdigest()
