"""A format of image data from outside the package: one .npz file a split, with the arrays `images` and `labels`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from cache_store.errors import DataError
from workers.data.files import SourceFile, join, open_root, source_file
from workers.data.images.facts import SPLITS, ImageFacts, Split
from workers.data.images.formats.base import DataFormat, FileFormat, ImageFiles, ImagePiece, overlaps
from workers.specs.experiment import ImageSpec


class Npz(DataFormat, FileFormat):
    """train.npz and test.npz: uint8 images (N, 3, 12, 12), labels 0 to 3."""

    name = "npz"
    facts = ImageFacts(mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25), class_names=("a", "b", "c", "d"), side=12)
    allowed = "a folder with train.npz and test.npz"

    def locate(self, data: ImageSpec) -> ImageFiles:
        filesystem, root = open_root(data, self.allowed)
        files: dict[Split, tuple[SourceFile, ...]] = {}
        for split in SPLITS:
            path = join(root, f"{split}.npz")
            if not filesystem.isfile(path):
                raise DataError(f"data.path: no {path}; allowed: {self.allowed}")
            rows = len(self._arrays(filesystem, path)["labels"])
            files[split] = (source_file(filesystem, root, filesystem.info(path), rows),)
        return ImageFiles(self, root, filesystem, files, self.facts.class_names)

    def pieces(self, source: ImageFiles, split: Split, rows: range) -> Iterator[ImagePiece]:
        for start, stop, index in overlaps(source.lengths(split), rows):
            path = source.files[split][index].path
            arrays = self._arrays(source.filesystem, path)
            yield ImagePiece(path, start, arrays["images"][start:stop], arrays["labels"][start:stop].tolist())

    def image(self, source: ImageFiles, item: np.ndarray, side: int) -> np.ndarray:
        return item

    @staticmethod
    def _arrays(filesystem: Any, path: str) -> dict[str, np.ndarray]:
        with filesystem.open(path, "rb") as stream:
            return dict(np.load(stream))
