"""Image files in a folder a class: finding them in both splits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image

from cache_store.errors import DataError
from workers.data.files import SourceFile, allowed_at, base_name, infos_of, join, open_root, source_file
from workers.data.images.facts import SPLITS, Split
from workers.data.images.formats.base import ImageFiles, fail
from workers.data.images.formats.decoder import _DECODE_ERRORS, _LARGE, _Decoder, _Piece
from workers.specs.experiment import ImageSpec

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".ppm", ".pgm", ".tif", ".tiff", ".webp")


def locate_folder(data: ImageSpec) -> ImageFiles:
    """The images of train/ and test/ (or val/), labelled by the names of train's folders. DataError as `locate`."""
    filesystem, root = open_root(data)
    if data.download:
        raise DataError("data.download: a folder cannot be downloaded; allowed for: cifar10, cifar100")
    folders: dict[Split, tuple[str, ...]] = {"train": ("train",), "test": ("test", "val")}
    problems: list[str] = []
    classes: dict[Split, dict[str, str]] = {}
    for split in SPLITS:
        present = [name for name in folders[split] if filesystem.isdir(join(root, name))]
        if not present:
            wanted = " or ".join(f"{name}/" for name in folders[split])
            problems.append(f"data.path: {root} has no {wanted}; allowed: {allowed_at('folder')}")
            continue
        folder = join(root, present[0])
        infos = [info for info in infos_of(filesystem, folder) if info["type"] == "directory"]
        classes[split] = {base_name(str(info["name"])): str(info["name"]) for info in infos}
        if not infos:
            problems.append(f"data.path: no class folders in {folder}; allowed: {allowed_at('folder')}")
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
            images = [
                info
                for path, info in sorted(filesystem.find(folder, detail=True).items())
                if path.lower().endswith(IMAGE_SUFFIXES) and not base_name(path).startswith(".")
            ]
            if not images:
                problems.append(f"data.path: no images in {folder}; allowed: {', '.join(IMAGE_SUFFIXES)}")
            described += [source_file(filesystem, root, info, 1, labels.get(name, -1)) for info in images]
        files[split] = tuple(described)
    fail(problems)
    return ImageFiles("folder", root, filesystem, files, names)


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
