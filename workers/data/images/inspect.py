"""What a data set is, read from its files without decoding an image and without importing torch.

`locate` finds the files of both splits, `inspect` describes them.
"""

from __future__ import annotations

from dataclasses import replace

from cache_store.errors import ConfigError, DataError
from workers.data.images.formats.base import ImageFiles
from workers.data.images.formats.table import IMAGE_FORMATS
from workers.data.images.outline import NOT_HERE, DataOutline
from workers.specs.experiment import ImageSpec


def inspect(data: ImageSpec) -> DataOutline:
    """Describe a data set; reads listings, Parquet footers and, for the python-pickle format, the batches.

    Raises DataError when files are missing or unreadable (all problems found at once) and ConfigError when
    `resize` is smaller than `image_size`.
    """
    return outline_of(data, locate(data))


def foresee(data: ImageSpec) -> DataOutline:
    """As `inspect`, but downloads nothing: describes a known data set that is to be downloaded as it will be."""
    rows = IMAGE_FORMATS[data.name].facts.rows
    if not data.download or rows is None:
        return inspect(data)
    try:
        return inspect(replace(data, download=False))
    except DataError as error:
        if "problems" in error.details:  # something is there, and damaged
            raise
    facts = IMAGE_FORMATS[data.name].facts
    side = facts.side or resize_of(data)
    return DataOutline(
        classes=len(facts.class_names),
        class_names=facts.class_names,
        native=(3, side, side),
        train_rows=rows[0],
        test_rows=rows[1],
        fingerprint=NOT_HERE,
        mean=facts.mean,
        std=facts.std,
    )


def outline_of(data: ImageSpec, source: ImageFiles) -> DataOutline:
    """Describe a data set already located."""
    facts = IMAGE_FORMATS[data.name].facts
    resize = resize_of(data)
    side = resize if facts.side is None else facts.side
    return DataOutline(
        classes=len(source.class_names),
        class_names=source.class_names,
        native=source.shape or (3, side, side),
        train_rows=source.rows("train"),
        test_rows=source.rows("test"),
        fingerprint=source.fingerprint(),
        mean=facts.mean,
        std=facts.std,
        held_out=source.held_out,
        skipped=source.skipped,
        target=source.target,
    )


def resize_of(data: ImageSpec) -> int:
    """Return the side to which images are resized before cropping; ConfigError when it is smaller than the crop."""
    resize = round(data.image_size * 256 / 224) if data.resize is None else data.resize
    if resize < data.image_size:
        raise ConfigError(
            f"data.resize: {resize} is smaller than data.image_size, {data.image_size}; allowed: "
            f"{data.image_size} or more, or none for image_size * 256 / 224"
        )
    return resize


def locate(data: ImageSpec) -> ImageFiles:
    """Find the files of both splits. Raises DataError naming what is missing, where, and what is allowed."""
    return IMAGE_FORMATS[data.name].locate(data)
