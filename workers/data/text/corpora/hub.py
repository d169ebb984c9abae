"""A data set of the Hugging Face hub, at a pinned revision, through the `datasets` package (optional)."""

from __future__ import annotations

import hashlib
import importlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from cache_store.errors import ConfigError, DataError
from workers.data.text.corpora.base import SPLITS, Corpus, Record
from workers.data.text.corpora.rows.columns import missing_column
from workers.file_digests import contents_digest
from workers.specs.language import TextSpec

_READ_ROWS = 1024


class HubCorpus(Corpus):
    """The rows of a hub data set, or of a folder laid out like one. Its own train, validation and test splits are
    taken where it has them. Downloads on first use, into the cache of `datasets`.

    ConfigError: `datasets` is not installed, or a hub id without `revision`. DataError: it cannot be loaded, or has
    no such column.
    """

    def __init__(self, data: TextSpec) -> None:
        if data.path is None:
            raise DataError(
                "data.path: none given for hub; allowed: the id of a data set on the hub, or a local folder"
            )
        local = os.path.isdir(os.path.expanduser(data.path))
        if not local and data.revision is None:
            raise ConfigError(
                f"data.revision: none given for {data.path}; allowed: a commit or tag of that data set, so that a run "
                "can be repeated"
            )
        self._column = data.column or "text"
        self._name = data.path
        self._sets = _load(data, local)
        digest = hashlib.sha256(b"hub")
        self.documents: dict[str, int] = {}
        self.bytes: dict[str, int] = {}
        for split in SPLITS:
            if split not in self._sets:
                continue
            rows = self._sets[split]
            if self._column not in rows.column_names:
                raise missing_column(f"{data.path} [{split}]", self._column, rows.column_names)
            self.documents[split] = len(rows)
            self.bytes[split] = int(rows.data.nbytes)
            digest.update(f"\x1e{split}\x1f{_contents(rows, local)}\x1f{len(rows)}\x1f{data.revision}".encode())
        if not self.documents.get("train"):
            raise DataError(f"data.path: {data.path} has no rows in a train split (it has {', '.join(self._sets)})")
        self.fingerprint = digest.hexdigest()

    def records(self, split: str, wanted: np.ndarray) -> Iterator[tuple[int, Record]]:
        """See `Corpus`."""
        column = self._sets[split].select_columns([self._column])
        chosen = np.flatnonzero(wanted)
        for first in range(0, len(chosen), _READ_ROWS):
            rows = chosen[first : first + _READ_ROWS]
            values = column[rows][self._column]
            for row, value in zip(rows.tolist(), values, strict=True):
                yield row, Record(value, f"{self._name} [{split}]", row)


def _contents(rows: Any, local: bool) -> str:
    """Identify what a split holds. Of a local folder: the Arrow files that `datasets` made of it, since its own
    fingerprint takes paths and times there. From the hub: its own fingerprint, by revision and files."""
    files = [Path(file["filename"]) for file in rows.cache_files] if local else []
    return contents_digest((path.name, path) for path in files) if files else str(rows._fingerprint)


def _load(data: TextSpec, local: bool) -> Any:
    try:
        datasets = importlib.import_module("datasets")
    except ImportError as error:
        raise ConfigError(
            "data.name: hub needs the package datasets: pip install 'segprop[lm]'; or take data.name: text with files"
        ) from error
    path = os.path.expanduser(data.path or "") if local else data.path
    try:
        return datasets.load_dataset(path, data.subset, revision=None if local else data.revision)
    except (OSError, ValueError, KeyError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        where = data.path if local else f"{data.path} at {data.revision}"
        raise DataError(f"data.path: hub data set {where} cannot be loaded: {error}") from error
