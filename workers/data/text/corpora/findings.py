"""What was odd in records and used all the same: counted, so that a user hears of it."""

from __future__ import annotations

from workers.data.text.corpora.base import Record
from workers.specs.data_results import Finding

#: Records named of each kind of finding.
NAMED = 3
#: Kinds of findings that are kept apart.
_KINDS = 32
#: Characters of a kind, or of a file's name: both may be anything, and the summary of a split is of a fixed size.
_LONGEST = 120


class Findings:
    """What was odd in records and used all the same: how often, and in which records first."""

    def __init__(self) -> None:
        self._counts: dict[str, int] = {}
        self._first: dict[str, list[str]] = {}

    def add(self, what: str, record: Record) -> None:
        """Count one."""
        self._add(what, 1, [f"row {record.row} of {record.file.rsplit('/', 1)[-1][-_LONGEST:]}"])

    def merge(self, other: Findings) -> None:
        """Count all of another."""
        for what, count in other._counts.items():
            self._add(what, count, other._first[what])

    def _add(self, what: str, count: int, rows: list[str]) -> None:
        what = what[:_LONGEST]
        what = what if what in self._counts or len(self._counts) < _KINDS else "others"
        self._counts[what] = self._counts.get(what, 0) + count
        first = self._first.setdefault(what, [])
        first += rows[: NAMED - len(first)]

    def found(self) -> dict[str, Finding]:
        """Return what was found, by kind in alphabetical order."""
        return {
            what: Finding(count=count, first=tuple(self._first[what])) for what, count in sorted(self._counts.items())
        }
