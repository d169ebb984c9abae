"""Which columns of a file make a document, whatever kind of file it is. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from cache_store.errors import DataError
from cache_store.suggest import did_you_mean
from workers.data.text.corpora.base import Record, failed

#: What columns are, or are called -> what they hold in a row.
Values = Mapping[str, Any]


@dataclass(frozen=True)
class Columns:
    """Which columns make a document: `needed` and `optional` hold what a column is -> its name in the file. `document`
    makes one of what the columns are -> values (None for optional ones that a row lacks)."""

    needed: Mapping[str, str]
    document: Callable[[Values], Any]
    optional: Mapping[str, str] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """Return the names of all columns that are read."""
        return [*self.needed.values(), *self.optional.values()]

    def record(self, row: Any, place: Record) -> Record:
        """Return the record of one row, column name -> value; a failed one where it is no such row."""
        if not isinstance(row, Mapping):
            return failed(place, f"a {type(row).__name__} instead of a JSON object")
        for name in self.needed.values():
            if name not in row:
                return place._replace(error=missing_column(f"row {place.row} of {place.file}", name, row))
        found = {what: row[name] for what, name in self.needed.items()}
        found |= {what: row.get(name) for what, name in self.optional.items()}
        return place._replace(value=self.document(found))


def missing_column(where: str, column: str, found: Iterable[str], setting: str = "data.column") -> DataError:
    """Return the error for a column that is not there, with the nearest one that is."""
    names = [str(name) for name in found]
    hint = did_you_mean(column, names, cutoff=0.5)
    what = f"has no {column!r}{hint} (it has {', '.join(names) or 'none'})"
    return DataError(f"{setting}: {where} {what}", column=column, what=what)


def text_column(column: str) -> Columns:
    """Return the columns of running text: the one that holds it."""
    return Columns({"text": column}, lambda row: row["text"])
