"""scikit-learn's digits: the images and labels of both splits, read without importing scikit-learn.

Importing it takes seconds, which would be most of a dry run; its packaged table of the digits is read directly.
"""

from __future__ import annotations

import gzip
import hashlib
from collections.abc import Iterator
from functools import lru_cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from workers.data.files import SourceFile
from workers.data.images.facts import DIGITS, Split
from workers.data.images.formats.base import DataFormat, FileFormat, ImageFiles, ImagePiece, overlaps
from workers.specs.experiment import ImageSpec

#: Images of the digits data set that form its test split, the same number for every class.
DIGITS_TEST_PER_CLASS = 36


def _table() -> np.ndarray:
    """float64 (1797, 65): 64 pixels and the label, as `sklearn.datasets.load_digits` reads them."""
    spec = find_spec("sklearn")
    for folder in (spec.submodule_search_locations or ()) if spec is not None else ():
        file = Path(folder, "datasets", "data", "digits.csv.gz")
        if file.is_file():
            with gzip.open(file, "rt", encoding="utf-8") as lines:
                return np.loadtxt(lines, delimiter=",")
    # Another version may keep it elsewhere (and ImportError says that there is no scikit-learn).
    from sklearn.datasets import load_digits

    bunch = load_digits()
    return np.column_stack([bunch.data, bunch.target])


@lru_cache(maxsize=1)
def digits() -> dict[Split, tuple[np.ndarray, np.ndarray]]:
    """Read scikit-learn's digits by split: images float64 (N, 8, 8) of 0..16 and labels int64 (N,).

    The test split takes, of every class, the images with the smallest hash of content and position.
    """
    table = _table()
    images, labels = table[:, :-1].reshape(-1, 8, 8), table[:, -1].astype(np.int64)
    order = np.array(
        [
            int.from_bytes(
                hashlib.blake2b(image.tobytes() + row.to_bytes(8, "little"), digest_size=8).digest(), "little"
            )
            for row, image in enumerate(images)
        ],
        dtype=np.uint64,
    )
    chosen = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        chosen[members[np.argsort(order[members], kind="stable")[:DIGITS_TEST_PER_CLASS]]] = True
    return {"train": (images[~chosen], labels[~chosen]), "test": (images[chosen], labels[chosen])}


class Digits(DataFormat, FileFormat):
    """scikit-learn's digits, the images and the files that hold them in one: nothing to find or to download."""

    name = "digits"
    facts = DIGITS
    allowed = "nothing: scikit-learn carries the images"

    def locate(self, data: ImageSpec) -> ImageFiles:
        """Describe both splits as one `SourceFile` each, stamped with scikit-learn's version and the content."""
        installed = version("scikit-learn")
        files: dict[Split, tuple[SourceFile, ...]] = {}
        for split, (images, labels) in digits().items():
            content = hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest()
            file = SourceFile(
                path=f"sklearn.datasets.load_digits [{split}]",
                name=split,
                size=images.nbytes,
                stamp=f"scikit-learn {installed} {content}",
                rows=len(labels),
            )
            files[split] = (file,)
        return ImageFiles(self, "sklearn.datasets.load_digits", None, files, self.facts.class_names)

    def pieces(self, source: ImageFiles, split: Split, rows: range) -> Iterator[ImagePiece]:
        """See `FileFormat`."""
        images, labels = digits()[split]
        for start, stop, index in overlaps(source.lengths(split), rows):
            yield ImagePiece(source.files[split][index].path, start, images[start:stop], labels[start:stop].tolist())

    def image(self, source: ImageFiles, item: np.ndarray, side: int) -> np.ndarray:
        """See `FileFormat`: grey, broadcast to three channels."""
        return np.rint(item * (255 / 16)).astype(np.uint8)
