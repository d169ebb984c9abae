"""Image files in a folder a class: finding them in both splits, and reading them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image

from cache_store.errors import DataError
from workers.data.files import SourceFile, base_name, files_below, infos_of, join, open_root, source_file
from workers.data.images.facts import ANY_IMAGES, Split
from workers.data.images.formats.base import DECODE_ERRORS, LARGE, DataFormat, FileFormat, ImageFiles, ImagePiece, fail
from workers.data.images.formats.pixels import upright_rgb
from workers.specs.experiment import ImageSpec

#: Suffixes of images; those that this machine's Pillow cannot open are no images here.
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".ppm", ".pgm", ".tif", ".tiff", ".webp", ".gif", ".avif", ".heic")
#: The folders of a data set that is split already.
_TRAIN, _VALIDATION, _TEST = "train", "val", "test"
#: Files in one piece.
_PIECE_FILES = 1024


class ClassFolders(DataFormat, FileFormat):
    """The images of train/, val/ and test/, labelled by the names of train's folders; or those of folders that are not
    split yet. Hidden files and folders are left out, symbolic links are followed."""

    name = "folder"
    version = 2
    pillow = True
    piece_rows = LARGE
    facts = ANY_IMAGES
    allowed = (
        "a folder with train/ and test/ (or val/), one subfolder of images a class; or the subfolders alone, which "
        "data.test and the seed then split"
    )

    def locate(self, data: ImageSpec) -> ImageFiles:
        """See `DataFormat`. With both val/ and test/, val/ holds the validation split; alone it is the test split."""
        filesystem, root = open_root(data, self.allowed)
        if data.download:
            raise DataError("data.download: a folder cannot be downloaded; allowed for: cifar10, cifar100")
        if not filesystem.isdir(root):
            raise DataError(f"data.path: there is no folder {root}; allowed: {self.allowed}")
        listing = _Listing(filesystem, root, self.allowed)
        folders = set(listing.classes(root))
        if folders and not folders & {_TRAIN, _VALIDATION, _TEST}:
            files: dict[Split, tuple[SourceFile, ...]] = {"train": listing.images(root, None), "test": ()}
            held_out = 0
        else:
            listing.check_splits(folders)
            train = listing.images(join(root, _TRAIN), None) if _TRAIN in folders else ()
            own = tuple(name for name in (_VALIDATION, _TEST) if name in folders)
            parts = {name: listing.images(join(root, name), _TRAIN) for name in own}
            validation = parts[_VALIDATION] if len(parts) == 2 else ()
            files = {"train": (*train, *validation), "test": parts[own[-1]] if own else ()}
            held_out = len(validation)
        if len(listing.names) == 1:
            listing.problems.append(
                f"data.path: {root} has one class alone, {listing.names[0]}: there is nothing to tell it from; "
                "allowed: two classes or more"
            )
        fail(listing.problems)
        skipped = tuple(sorted(listing.skipped.items()))
        return ImageFiles(self, root, filesystem, files, listing.names, held_out=held_out, skipped=skipped)

    def pieces(self, source: ImageFiles, split: Split, rows: range) -> Iterator[ImagePiece]:
        """See `FileFormat`: a row is a file."""
        for start in range(rows.start, rows.stop, _PIECE_FILES):
            files = source.files[split][start : min(start + _PIECE_FILES, rows.stop)]
            yield ImagePiece(f"{source.root} [{split}]", start, files, [file.label for file in files])

    def image(self, source: ImageFiles, item: SourceFile, side: int) -> np.ndarray:
        """See `FileFormat`: upright, the short side resized to `side`, and the centre cut out."""
        from torchvision.transforms.v2 import functional as F

        try:
            with source.filesystem.open(item.path, "rb") as stream, Image.open(stream) as image:
                resized = F.resize(upright_rgb(image), [side], antialias=True)
                return np.asarray(F.center_crop(resized, [side, side])).transpose(2, 0, 1)
        except DECODE_ERRORS as error:
            raise DataError(f"{item.path}: the image cannot be decoded: {error}") from error


@dataclass
class _Listing:
    """Lists class folders and their images. Gathers what is wrong, the files that are no images by suffix, and the
    classes, which the first folder listed decides."""

    filesystem: Any
    root: str
    allowed: str
    problems: list[str] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)
    names: tuple[str, ...] = ()

    def check_splits(self, folders: set[str]) -> None:
        """Note which splits have no folder."""
        for wanted in ((_TRAIN,), (_TEST, _VALIDATION)):
            if not folders & set(wanted):
                named = " or ".join(f"{name}/" for name in wanted)
                self.problems.append(f"data.path: {self.root} has no {named}; allowed: {self.allowed}")

    def classes(self, folder: str) -> dict[str, str]:
        """The path of each folder inside `folder`, by name."""
        infos = [info for info in infos_of(self.filesystem, folder) if info["type"] == "directory"]
        return {base_name(str(info["name"])): str(info["name"]) for info in infos}

    def images(self, folder: str, known: str | None) -> tuple[SourceFile, ...]:
        """The images of all classes in `folder`, whose classes must be those of the split `known`, where one is."""
        try:
            classes = self.classes(folder)
        except DataError as error:
            self._add(error)
            return ()
        if not classes:
            self.problems.append(f"data.path: no class folders in {folder}; allowed: {self.allowed}")
        if known is None:
            self.names = tuple(sorted(classes))
        unknown = sorted(set(classes) - set(self.names)) if self.names else []
        if unknown:
            self.problems.append(
                f"data.path: classes in {folder} that {known}/ does not have: {', '.join(unknown)}; "
                f"allowed: {', '.join(self.names)}"
            )
        labels = {name: label for label, name in enumerate(self.names)}
        described: list[SourceFile] = []
        for name, path in classes.items():
            found = self._images_in(path)
            described += [source_file(self.filesystem, self.root, i, 1, labels.get(name, -1)) for i in found]
        return tuple(described)

    def _images_in(self, folder: str) -> list[Mapping[str, Any]]:
        try:
            infos = files_below(self.filesystem, folder)
        except DataError as error:
            self._add(error)
            return []
        images = []
        for info in infos:
            suffix = _suffix(str(info["name"]))
            if suffix in readable_suffixes():
                images.append(info)
            else:
                self.skipped[suffix or "no suffix"] += 1
        if not images:
            self.problems.append(f"data.path: no images in {folder}; allowed: {', '.join(readable_suffixes())}")
        return sorted(images, key=lambda info: str(info["name"]))

    def _add(self, error: DataError) -> None:
        self.problems.extend(error.details.get("problems") or [error.message])


@lru_cache(maxsize=1)
def readable_suffixes() -> tuple[str, ...]:
    """Suffixes of the image files that this machine's Pillow opens."""
    known = Image.registered_extensions()
    return tuple(suffix for suffix in IMAGE_SUFFIXES if known.get(suffix) in Image.OPEN)


def _suffix(path: str) -> str:
    stem, dot, suffix = base_name(path).rpartition(".")
    return f".{suffix.lower()}" if stem and dot else ""
