"""What is wrong with files and rows that are looked at, said at once or skipped and counted. Pure."""

from __future__ import annotations

from cache_store.errors import DataError

#: Rows of a file that are named.
NAMED = 5


class Problems:
    """Collects what is wrong with a data set. With `skip` rows that cannot be used are counted alone."""

    def __init__(self, skip: bool) -> None:
        self._skip = skip
        self._files: list[str] = []
        self._rows: dict[str, list[str]] = {}
        self._counts: dict[str, int] = {}

    @property
    def said(self) -> bool:
        """Tell whether there is anything to refuse."""
        return bool(self._files or (self._rows and not self._skip))

    def file(self, message: str) -> None:
        """Take what is wrong with a whole file, or with all of them."""
        self._files.append(message)

    def row(self, file: str, message: str) -> None:
        """Take what is wrong with one row of a file."""
        self._counts[file] = self._counts.get(file, 0) + 1
        named = self._rows.setdefault(file, [])
        if len(named) < NAMED:
            named.append(message)

    def refuse(self) -> None:
        """Raise one DataError of everything that may not be skipped; do nothing where there is nothing."""
        lines = list(self._files)
        for file, named in () if self._skip else self._rows.items():
            more = self._counts[file] - len(named)
            lines += [*named[:-1], f"{named[-1]} (and {more} more rows of this file)" if more else named[-1]]
        if lines and not self._skip and self._rows:
            lines[-1] += "; data.bad: skip leaves such rows out"
        if lines:
            raise DataError("\n".join(lines), problems=lines)

    def notes(self, documents: int) -> tuple[str, ...]:
        """Say how many of the documents are skipped, as far as is known before they are prepared."""
        count = sum(self._counts.values())
        first = next((named[0] for named in self._rows.values()), "")
        return (f"{count} of {documents} rows cannot be used and are skipped ({first})",) if count else ()
