"""Decode a data set once into the store, as two sets (train, test) of rows (image, label).

Shards are decoded one after another, each by a pool of threads (Pillow works outside the GIL), so memory is
bounded by one shard and one row group of encoded images. Shards that are already there are not decoded again.
"""

from __future__ import annotations

import io
import os
import struct
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import PIL
from PIL import Image

from cache_store.errors import DataError
from cache_store.formats.codec import Field
from cache_store.keys import digest_json
from cache_store.snapshots.spec import SetSpec
from cache_store.snapshots.store import SnapshotStore
from workers.data.cifar import read_pickle
from workers.data.digits import digits
from workers.data.facts import FACTS, SPLITS, Split
from workers.data.inspect import DataOutline, locate, outline_of
from workers.data.missing import missing_shards
from workers.data.sources import Source
from workers.specs import DataSpec, rows_per_shard

SHARD_BYTES = 64 << 20
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


class Progress(Protocol):
    def __call__(self, *, done: int, total: int, unit: str) -> None: ...


def prepare(
    data: DataSpec,
    snapshots: SnapshotStore,
    progress: Progress | Callable[..., None] | None = None,
    fingerprint: str | None = None,
) -> dict[str, Any]:
    """Decode what is not in the store yet; return `{"train", "test", "digest", "rows", "classes"}`.

    `train` and `test` are set ids. Rows are image uint8 (3, H, W) and label int64 (), in the order of the
    files. Images of `folder` have their short side resized to `resize` (antialiased bilinear, torchvision's
    v2 on Pillow images) and the centre square cut out; EXIF rotation is not applied. `progress(done=, total=,
    unit="images")` counts both splits. Raises DataError: a corrupt image (file and row), an image of the
    wrong size, a label that is missing or out of range (file, row, allowed range); the files' fingerprint is
    not `fingerprint`, where one is given.
    """
    source = locate(data)
    outline = outline_of(data, source)
    if fingerprint not in (None, outline.fingerprint):
        raise DataError(f"data.path: the files of {source.root} have changed since the run was planned; run again")
    total = outline.train_rows + outline.test_rows
    before = 0  # rows of the splits that are complete
    sets: dict[str, str] = {}
    digests: list[str] = []
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1), thread_name_prefix="decode") as pool:
        decoder = _DECODERS[source.format](data, source, outline, pool)
        for split in SPLITS:
            target = snapshots.open(set_spec(data, source, outline, split))
            spec = target.spec
            while missing := missing_shards(target):
                done = before + spec.rows - sum(len(spec.shard_range(shard)) for shard in missing)
                for shard in missing:
                    rows = spec.shard_range(shard)
                    images = np.empty((len(rows), *outline.native), dtype=np.uint8)
                    labels = np.empty(len(rows), dtype=np.int64)
                    for count in decoder.decode(split, rows, images, labels):
                        done += count
                        if progress is not None:
                            progress(done=done, total=total, unit="images")
                    target.put(shard, (images, labels))
            before += spec.rows
            sets[split] = spec.id
            digests.append(target.digest())
    return {
        **sets,
        "digest": digest_json(digests),
        "rows": {"train": outline.train_rows, "test": outline.test_rows},
        "classes": outline.classes,
    }


def set_spec(data: DataSpec, source: Source, outline: DataOutline, split: Split) -> SetSpec:
    """The set of one split: its key names everything that determines the bytes."""
    decoder: dict[str, Any] = {"format": source.format, "version": 1}
    if source.format in ("parquet", "folder"):
        decoder["pillow"] = PIL.__version__
    if FACTS[data.name].side is None:
        decoder["resize"] = outline.native[1]
    rows = source.rows(split)
    row_bytes = int(np.prod(outline.native)) + 8
    shard_rows = min(rows, rows_per_shard(row_bytes, SHARD_BYTES, 1))
    return SetSpec(
        key={
            "kind": "images",
            "name": data.name,
            "fingerprint": outline.fingerprint,
            "split": split,
            "decoder": decoder,
        },
        rows=rows,
        fields=(Field("image", "uint8", outline.native), Field("label", "int64", ())),
        group_rows=shard_rows,
        shard_rows=shard_rows,
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

    def __init__(self, data: DataSpec, source: Source, outline: DataOutline, pool: ThreadPoolExecutor) -> None:
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


class _Digits(_Decoder):
    def file_piece(self, split: Split, index: int, start: int, stop: int) -> _Piece:
        images, labels = digits()[split]
        return _Piece(self.source.files[split][index].path, start, images[start:stop], labels[start:stop].tolist())

    def image(self, item: np.ndarray) -> np.ndarray:
        return np.rint(item * (255 / 16)).astype(np.uint8)  # grey: broadcast to three channels


class _Pickle(_Decoder):
    def file_piece(self, split: Split, index: int, start: int, stop: int) -> _Piece:
        file = self.source.files[split][index]
        pickles = FACTS[self.data.name].pickles
        assert pickles is not None
        images, labels = read_pickle(self.source.filesystem, file.path, pickles.label)
        return _Piece(file.path, start, images[start:stop], labels[start:stop])

    def image(self, item: np.ndarray) -> np.ndarray:
        return item


class _Parquet(_Decoder):
    def pieces(self, split: Split, rows: range) -> Iterator[_Piece]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        image_column, label_column = self.source.columns
        files = self.source.files[split]
        for start, stop, index in _overlaps([file.rows for file in files], rows):
            path = files[index].path
            try:
                with self.source.filesystem.open(path, "rb") as stream:
                    parquet = pq.ParquetFile(stream)
                    lengths = [parquet.metadata.row_group(group).num_rows for group in range(parquet.num_row_groups)]
                    for low, high, group in _overlaps(lengths, range(start, stop)):
                        table = parquet.read_row_group(group, columns=[image_column, label_column])
                        table = table.slice(low, high - low)
                        yield _Piece(
                            path,
                            sum(lengths[:group]) + low,
                            table.column(image_column),
                            table.column(label_column).to_pylist(),
                        )
            except (OSError, pa.ArrowException) as error:
                raise DataError(f"data.path: {path} cannot be read: {error}") from error

    def image(self, item: Any) -> np.ndarray:
        value = item.as_py()
        encoded = value.get("bytes") if isinstance(value, dict) else value
        if not encoded:
            raise ValueError("the column holds no bytes")
        with Image.open(io.BytesIO(encoded)) as image:
            return np.asarray(image.convert("RGB")).transpose(2, 0, 1)


class _Folder(_Decoder):
    piece_rows = _LARGE

    def pieces(self, split: Split, rows: range) -> Iterator[_Piece]:
        for start in range(rows.start, rows.stop, 1024):
            files = self.source.files[split][start : min(start + 1024, rows.stop)]
            yield _Piece(f"{self.source.root} [{split}]", start, files, [file.label for file in files])

    def image(self, item: Any) -> np.ndarray:
        from torchvision.transforms.v2 import functional as F

        side = self.outline.native[1]
        try:
            with self.source.filesystem.open(item.path, "rb") as stream, Image.open(stream) as image:
                resized = F.resize(image.convert("RGB"), [side], antialias=True)
                return np.asarray(F.center_crop(resized, [side, side])).transpose(2, 0, 1)
        except _DECODE_ERRORS as error:
            raise DataError(f"{item.path}: the image cannot be decoded: {error}") from error


_DECODERS: dict[str, type[_Decoder]] = {
    "digits": _Digits,
    "parquet": _Parquet,
    "pickle": _Pickle,
    "folder": _Folder,
}
