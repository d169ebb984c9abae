"""Python's own standard library: text that every machine has."""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from cache_store.errors import DataError
from workers.data.text.corpora.base import Corpus, Record
from workers.specs.language import TextSpec

#: Folders of the standard library that are not it, or are the tests of it.
_NOT_STDLIB = ("site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__")


class StdlibCorpus(Corpus):
    """The modules of this Python's standard library, tests and installed packages left out: text that every machine
    has. The fingerprint covers what they say, not where they lie."""

    def __init__(self, data: TextSpec) -> None:
        if data.path is not None:
            raise DataError(f"data.path: {data.path}: stdlib takes none; allowed: null (or data.name: text)")
        self._root = Path(sysconfig.get_path("stdlib"))
        names = []
        for path in self._root.rglob("*.py"):
            relative = path.relative_to(self._root)
            # _sysconfigdata is written by the build of this very Python: it differs from machine to machine.
            if not set(relative.parts) & set(_NOT_STDLIB) and not path.name.startswith("_sysconfigdata"):
                names.append(relative.as_posix())
        self._names = sorted(names)
        if not names:
            raise DataError(f"data.name: stdlib: this Python has no sources under {self._root}; allowed: text")
        digest = hashlib.sha256(b"stdlib")
        size = 0
        for name in self._names:
            content = self._content(name)
            size += len(content)
            digest.update(f"\x1e{name}\x1f{len(content)}\x1f".encode())
            digest.update(content)
        self.fingerprint = digest.hexdigest()
        self.documents = {"train": len(self._names)}
        self.bytes = {"train": size}

    def _content(self, name: str) -> bytes:
        try:
            return (self._root / name).read_bytes()
        except OSError as error:
            raise DataError(f"data.name: stdlib: {self._root / name} cannot be read: {error}") from error

    def records(self, split: str, wanted: np.ndarray) -> Iterator[tuple[int, Record]]:
        """See `Corpus`. The few sources in another encoding keep what is ASCII in them."""
        for number in np.flatnonzero(wanted).tolist():
            name = self._names[number]
            yield number, Record(self._content(name).decode("utf-8", errors="replace"), name, 0)
