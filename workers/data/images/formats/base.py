"""What a format of image data must say: `DataFormat` finds a data set's files, `FileFormat` reads images from them.

To add a format: write a class of both kinds (one class may be both), and add its row to `IMAGE_FORMATS` in
`workers.data.images.formats.table` and its name to `ImageSpec.name`.
"""

from __future__ import annotations

import abc
import struct
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from PIL import Image

from cache_store.errors import DataError
from workers.data.files import SourceFile, files_fingerprint
from workers.data.images.facts import SPLITS, ImageFacts, Split
from workers.data.images.targets import CLASSES, Target
from workers.specs.experiment import ImageSpec

#: Images a pool thread decodes at a time: enough to hide the cost of a task, few enough to share the work.
SMALL, LARGE = 256, 8
#: What Pillow raises for bytes that are not the image they claim to be.
DECODE_ERRORS = (
    OSError,
    ValueError,
    SyntaxError,
    EOFError,
    IndexError,
    KeyError,
    TypeError,
    OverflowError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


@dataclass(frozen=True)
class ImagePiece:
    """Some rows of one file: the file's name, the first row (counted in that file), what is to be decoded."""

    file: str
    first: int
    items: Any  # indexed by row
    labels: Sequence[Any]


class FileFormat(abc.ABC):
    """How files hold images: the rows in them, and the pixels of one."""

    #: Its word in fingerprints and in the keys of prepared sets.
    name: ClassVar[str]
    #: Raise it when the same files give other pixels: prepared sets are addressed by it.
    version: ClassVar[int] = 1
    #: Whether Pillow decodes: then its version is part of a prepared set's key.
    pillow: ClassVar[bool] = False
    #: Images that a thread decodes at a time.
    piece_rows: ClassVar[int] = SMALL

    @abc.abstractmethod
    def pieces(self, source: ImageFiles, split: Split, rows: range) -> Iterator[ImagePiece]:
        """Read the rows of a split in order, at most a bounded number of encoded bytes at a time."""

    @abc.abstractmethod
    def image(self, source: ImageFiles, item: Any, side: int) -> np.ndarray:
        """Decode one item of a piece: uint8, (3, H, W) or broadcastable to it. `side`: that of the images as they are
        stored. Raises one of DECODE_ERRORS, or DataError."""


@dataclass(frozen=True)
class ImageFiles:
    """Where the samples of both splits lie, and how they are read. `columns` names the image and label columns of
    Parquet files. The last `held_out` rows of train are the data set's own validation split. Without test files the
    test split is chosen among train's rows. `skipped`: files that are no images, counted by suffix."""

    format: FileFormat
    root: str
    filesystem: Any
    files: Mapping[Split, tuple[SourceFile, ...]]
    class_names: tuple[str, ...]
    columns: tuple[str, str] = ("", "")
    held_out: int = 0
    skipped: tuple[tuple[str, int], ...] = ()

    @property
    def shape(self) -> tuple[int, ...] | None:
        """Shape of the samples as they are stored; None: square images of the side that the format or `resize` says."""
        return None

    @property
    def dtype(self) -> str:
        """Type of the samples as they are stored."""
        return "uint8"

    @property
    def target(self) -> Target:
        """What the targets are, and how they are stored."""
        return CLASSES

    def rows(self, split: Split) -> int:
        """Count the samples in a split."""
        return sum(self.lengths(split))

    def lengths(self, split: Split) -> list[int]:
        """Count the samples in each file of a split."""
        return [file.rows for file in self.files[split]]

    def fingerprint(self) -> str:
        """Return the sha256 (hex) over format and its version, file names and contents; see `files_fingerprint`."""
        version = f" {self.format.version}" if self.format.version > 1 else ""
        return files_fingerprint(f"{self.format.name}{version}", ((split, self.files[split]) for split in SPLITS))


class DataFormat(abc.ABC):
    """A kind of image data set, as `data.name` names it. `facts`: what is known of it beforehand."""

    facts: ImageFacts
    #: Samples of any one shape, no images to crop, augment and normalise: floats as they are, uint8 scaled to 0..1.
    as_they_are: ClassVar[bool] = False
    #: What `data.path` may be, in words.
    allowed: str

    @abc.abstractmethod
    def locate(self, data: ImageSpec) -> ImageFiles:
        """Find the files of both splits. DataError naming what is missing, where, and what is allowed."""


def overlaps(lengths: Sequence[int], rows: range) -> Iterator[tuple[int, int, int]]:
    """Yield (start, stop, index): the ranges inside each of several consecutive pieces that make up `rows`."""
    first = 0
    for index, length in enumerate(lengths):
        start, stop = max(rows.start - first, 0), min(rows.stop - first, length)
        if start < stop:
            yield start, stop, index
        first += length


def fail(problems: Iterable[str]) -> None:
    """Raise one DataError of all problems; do nothing when there are none."""
    lines = list(problems)
    if lines:
        raise DataError("\n".join(lines), problems=lines)
