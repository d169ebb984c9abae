"""Decode encoded images to the prepared size, in pieces of fixed order, by several threads."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from cache_store.errors import DataError
from workers.data.images.facts import Split
from workers.data.images.formats.base import ImageFiles
from workers.data.images.outline import DataOutline
from workers.specs.experiment import ImageSpec

#: Images a pool thread decodes at a time: enough to hide the cost of a task, few enough to share the work.
_SMALL, _LARGE = 256, 8
#: What Pillow raises for bytes that are not the image they claim to be.
_DECODE_ERRORS = (
    OSError,
    ValueError,
    SyntaxError,
    EOFError,
    IndexError,
    KeyError,
    TypeError,
    struct.error,
    Image.DecompressionBombError,
)


@dataclass(frozen=True)
class _Piece:
    """Some rows of one file: the file's name, the first row (counted in that file), what is to be decoded."""

    file: str
    first: int
    items: Any  # indexed by row
    labels: Sequence[Any]


class _Decoder:
    """Decodes ranges of rows of a split; formats differ in where `pieces` come from and in `image`."""

    piece_rows = _SMALL

    def __init__(self, data: ImageSpec, source: ImageFiles, outline: DataOutline, pool: ThreadPoolExecutor) -> None:
        self.data = data
        self.source = source
        self.outline = outline
        self.pool = pool

    def pieces(self, split: Split, rows: range) -> Iterator[_Piece]:
        """The rows in order, at most a bounded number of encoded bytes at a time."""
        for start, stop, index in _overlaps([file.rows for file in self.source.files[split]], rows):
            yield self.file_piece(split, index, start, stop)

    def file_piece(self, split: Split, index: int, start: int, stop: int) -> _Piece:
        raise NotImplementedError

    def image(self, item: Any) -> np.ndarray:
        """One image as uint8, (3, H, W) or broadcastable to it; raises one of _DECODE_ERRORS or DataError."""
        raise NotImplementedError

    def decode(self, split: Split, rows: range, images: np.ndarray, labels: np.ndarray) -> Iterator[int]:
        """Fill `images` uint8 (N, 3, H, W) and `labels` int64 (N,); yields how many rows were just done."""
        at = 0
        for piece in self.pieces(split, rows):
            labels[at : at + len(piece.labels)] = self._labels(piece)
            futures: list[Future[int]] = []
            for start in range(0, len(piece.items), self.piece_rows):
                stop = min(start + self.piece_rows, len(piece.items))
                out = images[at + start : at + stop]
                futures.append(self.pool.submit(self._decode_some, piece, start, stop, out))
            try:
                for future in futures:  # in order, so that the first bad row is the one reported
                    yield future.result()
            finally:
                for future in futures:
                    future.cancel()
            at += len(piece.items)
        assert at == len(rows), f"{at} rows instead of {len(rows)}"

    def _decode_some(self, piece: _Piece, start: int, stop: int, out: np.ndarray) -> int:
        for row in range(start, stop):
            where = f"row {piece.first + row} of {piece.file}"
            try:
                image = self.image(piece.items[row])
            except _DECODE_ERRORS as error:
                raise DataError(f"{where}: the image cannot be decoded: {error}") from error
            if image.shape[-2:] != out.shape[-2:]:
                found, wanted = (" x ".join(map(str, shape[-2:])) for shape in (image.shape, out.shape))
                raise DataError(f"{where}: the image has {found} pixels; allowed: {wanted}")
            out[row - start] = image
        return stop - start

    def _labels(self, piece: _Piece) -> np.ndarray:
        classes = self.outline.classes
        bad = [
            (row, label)
            for row, label in enumerate(piece.labels)
            if not isinstance(label, int | np.integer) or not 0 <= label < classes
        ]
        if bad:
            row, label = bad[0]
            more = f" (and {len(bad) - 1} more)" if len(bad) > 1 else ""
            shown = "missing" if label is None else repr(label)
            raise DataError(
                f"row {piece.first + row} of {piece.file}: the label is {shown}; allowed: 0 to {classes - 1}{more}",
                file=piece.file,
                row=piece.first + row,
            )
        return np.asarray(piece.labels, dtype=np.int64)


def _overlaps(lengths: Sequence[int], rows: range) -> Iterator[tuple[int, int, int]]:
    """(start, stop, index): the ranges inside each of several consecutive pieces that make up `rows`."""
    first = 0
    for index, length in enumerate(lengths):
        start, stop = max(rows.start - first, 0), min(rows.stop - first, length)
        if start < stop:
            yield start, stop, index
        first += length
