"""CIFAR-10 and CIFAR-100 as Parquet files or as torchvision's download: finding the files, reading a pickle.

Nothing in a pickle is run: only plain containers and numpy arrays are read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from fsspec.implementations.local import LocalFileSystem

from cache_store.errors import DataError
from workers.data.files import SourceFile, base_name, infos_of, join, open_root, source_file
from workers.data.images.facts import SPLITS, ImageFacts, Split
from workers.data.images.formats import parquet
from workers.data.images.formats.base import DataFormat, FileFormat, ImageFiles, ImagePiece, fail, overlaps
from workers.data.images.formats.plain_pickle import PickledArray, read_plain_pickle
from workers.specs.experiment import ImageSpec

#: CIFAR-100's largest file has 155 MB.
_MOST_BYTES = 1 << 30


@dataclass(frozen=True)
class Pickles(FileFormat):
    """torchvision's download of a data set: its folder, the files of each split, the key of the labels, and the class
    of torchvision that downloads it."""

    folder: str
    files: Mapping[Split, tuple[str, ...]]
    label: str
    dataset: str

    name = "pickle"

    def pieces(self, source: ImageFiles, split: Split, rows: range) -> Iterator[ImagePiece]:
        """See `FileFormat`: the rows of one batch file at a time."""
        for start, stop, index in overlaps(source.lengths(split), rows):
            path = source.files[split][index].path
            images, labels = read_pickle(source.filesystem, path, self.label)
            yield ImagePiece(path, start, images[start:stop], labels[start:stop])

    def image(self, source: ImageFiles, item: np.ndarray, side: int) -> np.ndarray:
        """See `FileFormat`: it is not encoded."""
        return item

    def find(self, filesystem: Any, root: str, class_names: tuple[str, ...]) -> ImageFiles | None:
        """Find the files of both splits under `root`; None when there is none of them. DataError, all problems at once,
        when some are missing or damaged."""
        wanted = [name for split in SPLITS for name in self.files[split]]
        for folder in (root, join(root, self.folder)):
            found = infos_of(filesystem, folder)
            infos = {base_name(str(info["name"])): info for info in found if info["type"] == "file"}
            if infos.keys() & set(wanted):
                break
        else:
            return None
        problems = [f"data.path: {name} is missing in {folder}" for name in wanted if name not in infos]
        files: dict[Split, tuple[SourceFile, ...]] = {}
        for split in SPLITS:
            described = []
            for name in (name for name in self.files[split] if name in infos):
                try:
                    _, labels = read_pickle(filesystem, str(infos[name]["name"]), self.label)
                except DataError as error:
                    problems.append(error.message)
                    continue
                described.append(source_file(filesystem, root, infos[name], len(labels)))
            files[split] = tuple(described)
        fail(problems)
        return ImageFiles(self, root, filesystem, files, class_names)


class Cifar(DataFormat):
    """CIFAR-10 or CIFAR-100: torchvision's pickles, or Parquet files whose label is in one of `labels`."""

    def __init__(self, facts: ImageFacts, labels: tuple[str, ...], pickles: Pickles) -> None:
        self.facts = facts
        self._labels = labels
        self._pickles = pickles
        self.allowed = (
            "a folder holding train-*.parquet and test-*.parquet (itself or in "
            f"{', '.join(f'{folder}/' for folder in parquet.FOLDERS[1:])}), or torchvision's {pickles.folder}/"
        )

    def locate(self, data: ImageSpec) -> ImageFiles:
        """See `DataFormat`: the files under `data.path`, downloaded first where that is wanted."""
        filesystem, root = open_root(data, self.allowed)
        if filesystem.isfile(root):  # one Parquet file of a folder: the folder is meant
            root = root.rsplit("/", 1)[0]
        names = self.facts.class_names
        found = self._pickles.find(filesystem, root, names)
        found = found or parquet.find_parquet(filesystem, root, self._labels, names)
        if found is None and data.download:
            self._download(data, filesystem, root)
            found = self._pickles.find(filesystem, root, names)
        if found is None:
            what = "holds no data" if filesystem.exists(root) else "does not exist"
            hint = "" if data.download else "; `data.download: true` fetches it"
            raise DataError(f"data.path: {data.path} {what}; allowed: {self.allowed}{hint}")
        return found

    def _download(self, data: ImageSpec, filesystem: Any, root: str) -> None:
        """Let torchvision download its copy into `root` (the only place here that imports torchvision)."""
        if not isinstance(filesystem, LocalFileSystem):
            raise DataError(f"data.download: downloads go to a local folder, not to {data.path}")
        from torchvision import datasets

        try:
            getattr(datasets, self._pickles.dataset)(root, download=True)
        except (OSError, RuntimeError) as error:
            raise DataError(f"data.download: cannot download {data.name} to {root}: {error}") from error


def read_pickle(filesystem: Any, path: str, label_key: str) -> tuple[np.ndarray, list[Any]]:
    """Read one batch of torchvision's CIFAR folder: images uint8 (N, 3, 32, 32) and its N labels as they stand.

    Only plain containers and numpy arrays are read. Raises DataError naming the file.
    """
    try:
        with filesystem.open(path, "rb") as stream:
            raw = stream.read(_MOST_BYTES + 1)
        if len(raw) > _MOST_BYTES:
            raise ValueError(f"larger than {_MOST_BYTES} bytes")
        content = read_plain_pickle(raw)
        if not isinstance(content, dict):
            raise ValueError("it holds no dictionary")
        missing = [key for key in ("data", label_key) if key not in content]
        if missing:
            raise DataError(f"data.path: {path} has no entry {missing[0]!r}; needed: data and {label_key}")
        data, labels = content["data"], content[label_key]
        if not isinstance(data, PickledArray) or not isinstance(labels, list):
            raise ValueError("its data are no array, or its labels no list")
        images = data.array().reshape(-1, 3, 32, 32)
    except (OSError, ValueError) as error:
        raise DataError(f"data.path: {path} is not a CIFAR batch: {error}") from error
    if images.dtype != np.uint8 or len(images) != len(labels):
        raise DataError(
            f"data.path: {path} holds {len(images)} images of {images.dtype} and {len(labels)} labels; "
            "needed: uint8 images of 3 x 32 x 32, one label each"
        )
    return images, labels
