"""Read files that only grow, such as a run's log, a piece at a time: each look reads what has come since the last."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cache_store.storage.durable import open_regular

#: Bytes that one look takes; of a longer file that was not read before, the last ones.
MOST_BYTES = 64 << 20


class Tail:
    """The lines of a file of JSON objects. `begun` tells how often it was read from its start: a file that has become
    another one, or shorter, is read anew."""

    def __init__(self, path: Path, most_bytes: int = MOST_BYTES) -> None:
        self._path = path
        self._most = most_bytes
        self._inode = -1
        self._offset = 0
        self.begun = 0

    def read(self) -> list[dict[str, Any]]:
        """Return the objects that were appended since the last call. A line that is not whole yet waits for the next
        one; what is no object is passed over. No file, or one that cannot be read: nothing."""
        try:
            descriptor = open_regular(self._path)
        except OSError:
            return []
        with open(descriptor, "rb") as file:
            status = os.fstat(file.fileno())
            fresh = status.st_ino != self._inode or status.st_size < self._offset
            if fresh:
                self._inode, self._offset = status.st_ino, 0
                self.begun += 1
            cut = status.st_size - self._offset > self._most
            if cut:
                self._offset = status.st_size - self._most
            file.seek(self._offset)
            data = file.read(self._most)
        end = data.rfind(b"\n") + 1
        self._offset += end
        lines = data[:end].splitlines()
        return list(_objects(lines[1:] if cut else lines))


def _objects(lines: list[bytes]) -> Iterator[dict[str, Any]]:
    for line in lines:
        try:
            found = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(found, dict):
            yield found
