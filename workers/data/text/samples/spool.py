"""Tokens of a split on their way to the store: a set's address needs its number of rows, known only at the end."""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from typing import Any

import numpy as np


class Spool:
    """Tokens and flags in two unnamed temporary files (five bytes a token; `TMPDIR` says where), so that memory does
    not grow with the data. A context manager; read only after the last `add`."""

    def __init__(self) -> None:
        self.tokens = 0
        self._closing = ExitStack()
        self._files = [self._closing.enter_context(tempfile.TemporaryFile()) for _ in range(2)]  # noqa: SIM115

    def __enter__(self) -> Spool:
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.close()

    def add(self, tokens: np.ndarray, flags: np.ndarray) -> None:
        """Append int32 tokens and uint8 flags."""
        for file, values in zip(self._files, (tokens, flags), strict=True):
            file.write(np.ascontiguousarray(values).data)
        self.tokens += len(tokens)

    def read(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Read tokens and flags of a range, as arrays of the caller's own."""
        return self._range(0, np.int32, start, stop), self._range(1, np.uint8, start, stop)

    def flags(self, start: int, stop: int) -> np.ndarray:
        """Read the flags of a range alone."""
        return self._range(1, np.uint8, start, stop)

    def _range(self, index: int, dtype: Any, start: int, stop: int) -> np.ndarray:
        size = np.dtype(dtype).itemsize
        self._files[index].seek(start * size)
        return np.frombuffer(bytearray(self._files[index].read((stop - start) * size)), dtype)
