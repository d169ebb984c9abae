"""What a data set is, read from its files without decoding an image and without importing torch.

`locate` finds the files of both splits, `inspect` describes them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from cache_store.errors import ConfigError
from workers.data.cifar import locate_cifar
from workers.data.class_folders import locate_folder
from workers.data.digits import locate_digits
from workers.data.facts import FACTS, Triple
from workers.data.sources import Source
from workers.specs import DataSpec


@dataclass(frozen=True)
class DataOutline:
    """A data set in figures.

    `native` is (C, H, W) of the images as stored by `prepare`; `fingerprint` (sha256, hex) changes when a
    file is added, removed, renamed, resized or rewritten; `mean` and `std` normalise pixels scaled to 0..1.
    """

    classes: int
    class_names: tuple[str, ...]
    native: tuple[int, int, int]
    train_rows: int
    test_rows: int
    fingerprint: str
    mean: Triple
    std: Triple


def inspect(data: DataSpec) -> DataOutline:
    """Describe a data set; reads listings, Parquet footers and, for the python-pickle format, the batches.

    Raises DataError when files are missing or unreadable (all problems found at once) and ConfigError when
    `resize` is smaller than `image_size`.
    """
    return outline_of(data, locate(data))


def outline_of(data: DataSpec, source: Source) -> DataOutline:
    """The outline of a data set already located."""
    facts = FACTS[data.name]
    resize = resize_of(data)
    side = resize if facts.side is None else facts.side
    return DataOutline(
        classes=len(source.class_names),
        class_names=source.class_names,
        native=(3, side, side),
        train_rows=source.rows("train"),
        test_rows=source.rows("test"),
        fingerprint=source.fingerprint(),
        mean=facts.mean,
        std=facts.std,
    )


def resize_of(data: DataSpec) -> int:
    """Side to which images are resized before cropping; ConfigError when it is smaller than the crop."""
    resize = round(data.image_size * 256 / 224) if data.resize is None else data.resize
    if resize < data.image_size:
        raise ConfigError(
            f"data.resize: {resize} is smaller than data.image_size, {data.image_size}; allowed: "
            f"{data.image_size} or more, or none for image_size * 256 / 224"
        )
    return resize


def locate(data: DataSpec) -> Source:
    """Find the files of both splits. Raises DataError naming what is missing, where, and what is allowed."""
    return _LOCATORS[data.name](data)


_LOCATORS: dict[str, Callable[[DataSpec], Source]] = {
    "digits": locate_digits,
    "cifar10": locate_cifar,
    "cifar100": locate_cifar,
    "folder": locate_folder,
}
