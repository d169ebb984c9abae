"""Keep the order in which a sweep's trials were judged in its run directory.

asha and pbt decide by what they have heard so far, so their decisions depend on the order of the reports. After an
interruption all reports are there at once; given in the old order they lead to the old decisions. Losing the file
costs nothing but that.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable
from pathlib import Path

from cache_store.records.record_io import MAX_RECORD_BYTES
from cache_store.storage.durable import open_appending, read_regular, typed_errors, write_atomically

Entry = tuple[str, int]


class SweepLog:
    """One line a report: a trial's folder and its stages. A torn last line (a process was killed) is dropped."""

    def __init__(self, path: Path | None) -> None:
        """None: nothing is kept, for a sweep in which nothing is decided on the way."""
        self._path = path
        self._made: list[Entry] = []
        self._expected = _read(path) if path is not None else []
        if path is not None and path.exists():
            self._write(self._expected)  # without the torn line, which the next one would be glued to

    def expected(self, over: Collection[str]) -> Entry | None:
        """Return the report that came next; those of trials that are over by now do not come."""
        while self._expected and self._expected[0][0] in over:
            self._expected.pop(0)
        return self._expected[0] if self._expected else None

    def add(self, folder: str, stages: int) -> None:
        """Note that a trial was judged after so many stages."""
        entry = (folder, stages)
        self._made.append(entry)
        if self._expected and self._expected[0] == entry:
            self._expected.pop(0)
        elif self._path is not None:
            with typed_errors("write", self._path), open_appending(self._path) as file:
                file.write(json.dumps(entry) + "\n")

    def forget(self) -> None:
        """Drop what was expected and does not come: from here on the order is a new one."""
        self._expected = []
        self._write(self._made)

    def _write(self, entries: Iterable[Entry]) -> None:
        if self._path is not None:
            write_atomically(self._path, "".join(json.dumps(entry) + "\n" for entry in entries).encode())


def _read(path: Path) -> list[Entry]:
    found: list[Entry] = []
    if not path.exists():
        return found
    with typed_errors("read", path):
        lines = read_regular(path, MAX_RECORD_BYTES).decode(errors="replace").splitlines()
    for line in lines:
        try:
            folder, stages = json.loads(line)
            found.append((str(folder), int(stages)))
        except (ValueError, TypeError, RecursionError):
            break
    return found
