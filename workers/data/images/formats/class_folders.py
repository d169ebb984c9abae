"""Image files in a folder a class: finding them in both splits, and reading them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from PIL import Image

from cache_store.errors import DataError
from workers.data.files import SourceFile, base_name, infos_of, join, open_root, source_file
from workers.data.images.facts import ANY_IMAGES, SPLITS, Split
from workers.data.images.formats.base import DECODE_ERRORS, LARGE, DataFormat, FileFormat, ImageFiles, ImagePiece, fail
from workers.specs.experiment import ImageSpec

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".ppm", ".pgm", ".tif", ".tiff", ".webp")
_SPLIT_FOLDERS: dict[Split, tuple[str, ...]] = {"train": ("train",), "test": ("test", "val")}
#: Files in one piece.
_PIECE_FILES = 1024


class ClassFolders(DataFormat, FileFormat):
    """The images of train/ and test/ (or val/), labelled by the names of train's folders."""

    name = "folder"
    pillow = True
    piece_rows = LARGE
    facts = ANY_IMAGES
    allowed = "a folder with train/ and test/ (or val/), one subfolder of images a class"

    def locate(self, data: ImageSpec) -> ImageFiles:
        """See `DataFormat`."""
        filesystem, root = open_root(data, self.allowed)
        if data.download:
            raise DataError("data.download: a folder cannot be downloaded; allowed for: cifar10, cifar100")
        problems: list[str] = []
        classes: dict[Split, dict[str, str]] = {}
        for split in SPLITS:
            found = self._class_folders(filesystem, root, split, problems)
            if found is not None:
                classes[split] = found
        names = tuple(sorted(classes.get("train", {})))
        unknown = sorted(set(classes.get("test", {})) - set(names)) if names else []
        if unknown:
            problems.append(
                f"data.path: classes of the test split that train/ does not have: {', '.join(unknown)}; "
                f"allowed: {', '.join(names)}"
            )
        labels = {name: label for label, name in enumerate(names)}
        files: dict[Split, tuple[SourceFile, ...]] = {}
        for split, members in classes.items():
            described: list[SourceFile] = []
            for name, folder in members.items():
                images = _images_in(filesystem, folder)
                if not images:
                    problems.append(f"data.path: no images in {folder}; allowed: {', '.join(IMAGE_SUFFIXES)}")
                described += [source_file(filesystem, root, info, 1, labels.get(name, -1)) for info in images]
            files[split] = tuple(described)
        fail(problems)
        return ImageFiles(self, root, filesystem, files, names)

    def _class_folders(self, filesystem: Any, root: str, split: Split, problems: list[str]) -> dict[str, str] | None:
        """The path of each class's folder, by class; None when the split has no folder. Adds to `problems`."""
        present = [name for name in _SPLIT_FOLDERS[split] if filesystem.isdir(join(root, name))]
        if not present:
            wanted = " or ".join(f"{name}/" for name in _SPLIT_FOLDERS[split])
            problems.append(f"data.path: {root} has no {wanted}; allowed: {self.allowed}")
            return None
        folder = join(root, present[0])
        infos = [info for info in infos_of(filesystem, folder) if info["type"] == "directory"]
        if not infos:
            problems.append(f"data.path: no class folders in {folder}; allowed: {self.allowed}")
        return {base_name(str(info["name"])): str(info["name"]) for info in infos}

    def pieces(self, source: ImageFiles, split: Split, rows: range) -> Iterator[ImagePiece]:
        """See `FileFormat`: a row is a file."""
        for start in range(rows.start, rows.stop, _PIECE_FILES):
            files = source.files[split][start : min(start + _PIECE_FILES, rows.stop)]
            yield ImagePiece(f"{source.root} [{split}]", start, files, [file.label for file in files])

    def image(self, source: ImageFiles, item: SourceFile, side: int) -> np.ndarray:
        """See `FileFormat`: the short side resized to `side`, and the centre cut out."""
        from torchvision.transforms.v2 import functional as F

        try:
            with source.filesystem.open(item.path, "rb") as stream, Image.open(stream) as image:
                resized = F.resize(image.convert("RGB"), [side], antialias=True)
                return np.asarray(F.center_crop(resized, [side, side])).transpose(2, 0, 1)
        except DECODE_ERRORS as error:
            raise DataError(f"{item.path}: the image cannot be decoded: {error}") from error


def _images_in(filesystem: Any, folder: str) -> list[Mapping[str, Any]]:
    return [
        info
        for path, info in sorted(filesystem.find(folder, detail=True).items())
        if path.lower().endswith(IMAGE_SUFFIXES) and not base_name(path).startswith(".")
    ]
