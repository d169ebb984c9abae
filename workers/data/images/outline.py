"""What is known of an image data set before it is decoded."""

from __future__ import annotations

from dataclasses import dataclass

from workers.data.images.facts import Triple
from workers.data.images.targets import CLASSES, Target

#: Fingerprint of a data set that is still to be downloaded.
NOT_HERE = "not downloaded"


@dataclass(frozen=True)
class DataOutline:
    """A data set in figures.

    `train_rows` and `test_rows` count the files' own splits: the last `held_out` rows of train are a validation split,
    and where `test_rows` is 0, a test split is chosen among train's rows. `skipped`: files that are no images, counted
    by suffix. `native` is the shape of a sample as stored by `prepare`, of images (C, H, W); `fingerprint` (sha256,
    hex) changes when a file is added, removed, renamed or gets another content; `mean` and `std` normalise pixels
    scaled to 0..1. `classes`: of targets that are no classes the outputs that the head has for them.
    """

    classes: int
    class_names: tuple[str, ...]
    native: tuple[int, ...]
    train_rows: int
    test_rows: int
    fingerprint: str
    mean: Triple
    std: Triple
    held_out: int = 0
    skipped: tuple[tuple[str, int], ...] = ()
    target: Target = CLASSES
