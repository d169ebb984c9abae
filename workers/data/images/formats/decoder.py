"""Decode encoded images to the prepared size, in pieces of fixed order, by several threads."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from cache_store.errors import DataError
from workers.data.images.facts import Split
from workers.data.images.formats.base import DECODE_ERRORS, ImageFiles, ImagePiece
from workers.data.images.outline import DataOutline
from workers.data.images.targets import CLASSES


class Decoder:
    """Decodes ranges of rows of a split, on the threads of `pool`."""

    def __init__(self, source: ImageFiles, outline: DataOutline, pool: ThreadPoolExecutor) -> None:
        self.source = source
        self.outline = outline
        self.pool = pool

    def decode(self, split: Split, rows: range, images: np.ndarray, labels: np.ndarray) -> Iterator[int]:
        """Fill `images` (uint8 (N, 3, H, W), but for samples of other shapes) and `labels` (int64 (N,), but for targets
        that are no classes); yields how many rows were just done."""
        at = 0
        for piece in self.source.format.pieces(self.source, split, rows):
            labels[at : at + len(piece.labels)] = self._labels(piece)
            yield from self._decode_piece(piece, images[at : at + len(piece.items)])
            at += len(piece.items)
        if at != len(rows):
            raise DataError(f"data.path: {self.source.root} has {at} rows where it had {len(rows)}; run again")

    def _decode_piece(self, piece: ImagePiece, out: np.ndarray) -> Iterator[int]:
        size = self.source.format.piece_rows
        futures: list[Future[int]] = []
        for start in range(0, len(piece.items), size):
            stop = min(start + size, len(piece.items))
            futures.append(self.pool.submit(self._decode_some, piece, start, stop, out[start:stop]))
        try:
            for future in futures:  # in order, so that the first bad row is the one reported
                yield future.result()
        finally:
            for future in futures:
                future.cancel()

    def _decode_some(self, piece: ImagePiece, start: int, stop: int, out: np.ndarray) -> int:
        for row in range(start, stop):
            where = f"row {piece.first + row} of {piece.file}"
            try:
                image = self.source.format.image(self.source, piece.items[row], self.outline.native[-1])
            except DECODE_ERRORS as error:
                raise DataError(f"{where}: the image cannot be decoded: {error}") from error
            if image.shape[-2:] != out.shape[1:][-2:]:
                found, wanted = (" x ".join(map(str, shape[-2:])) for shape in (image.shape, out.shape[1:]))
                raise DataError(f"{where}: the image has {found} pixels; allowed: {wanted}")
            out[row - start] = image
        return stop - start

    def _labels(self, piece: ImagePiece) -> np.ndarray:
        if self.outline.target != CLASSES:
            return np.stack(piece.labels)  # each was checked when it was read
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
