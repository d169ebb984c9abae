"""Every random choice of a view, drawn by hashing (seed, view, sample, number of the draw), not from a stream.

Crop and erase boxes and flips are chosen here, with numpy alone; `rand_augment` draws its operations by the
numbers kept free for it, so that all numbers stand in one table.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

#: RandomResizedCrop of the paper: area and aspect ratio relative to the resized image.
CROP_SCALE = (0.6, 1.0)
CROP_RATIO = (3 / 4, 4 / 3)
#: RandomErasing of the paper.
ERASE_PROBABILITY = 0.25
ERASE_SCALE = (0.02, 0.2)
ERASE_RATIO = (0.3, 3.3)

# Draws of a view by number. Crop and erase try up to _TRIES boxes, as torchvision does.
_TRIES = 10
_CROP_AREA, _CROP_RATIO, _CROP_TOP, _CROP_LEFT = 0, 10, 20, 21
_FLIP = 22
#: RandAugment's: an operation and its sign a slot, four slots at most.
OPERATION, SIGN = 24, 28
_ERASE, _ERASE_TOP, _ERASE_LEFT, _ERASE_AREA, _ERASE_RATIO = 32, 33, 34, 40, 50


def _mix(value: np.ndarray) -> np.ndarray:
    """splitmix64's finaliser, element by element (uint64, wraps)."""
    mixed: np.ndarray = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed ^= mixed >> np.uint64(31)
    return mixed


_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


class Draws:
    """Numbered random draws for every sample of a batch: functions of (seed, sample, view, number) alone."""

    def __init__(self, seed: int, samples: np.ndarray, view: int) -> None:
        """`samples`: int64 (B,), rows of the prepared set; `seed` and `view`: 0 .. 2^64 - 1."""
        state = _mix(np.array([seed], dtype=np.uint64) + _GOLDEN)
        state = _mix(state + np.array([view + 1], dtype=np.uint64) * _GOLDEN)
        self._base = _mix(state ^ (samples.astype(np.uint64) + np.uint64(1)) * _GOLDEN)

    def bits(self, number: int, count: int = 1) -> np.ndarray:
        """Draw 32 random bits as int64 (B, count): the draws `number` .. `number + count - 1`."""
        numbers = np.arange(number + 1, number + 1 + count, dtype=np.uint64)
        return (_mix(self._base[:, None] + numbers * _GOLDEN) >> np.uint64(32)).astype(np.int64)

    def uniform(self, number: int, count: int = 1) -> np.ndarray:
        """Draw float64 (B, count) in [0, 1), multiples of 2^-32."""
        return self.bits(number, count) * 2.0**-32

    def below(self, number: int, bounds: np.ndarray | int) -> np.ndarray:
        """Draw int64 (B,): uniform on 0 .. bounds - 1, bounds (B,) or one for all, at most 2^31."""
        result: np.ndarray = (self.bits(number)[:, 0] * bounds) >> 32
        return result


@lru_cache(maxsize=4)
def _ratios(low: float, high: float) -> np.ndarray:
    """65,536 aspect ratios, uniform in their logarithm: a table, as a vectorised exp may vary by machine."""
    span = math.log(high) - math.log(low)
    return np.array([math.exp(math.log(low) + span * (i + 0.5) / 65536) for i in range(65536)])


@dataclass(frozen=True)
class Boxes:
    """A box a sample, int64 (B,) each; `found` is False where no try gave a box that fits."""

    top: np.ndarray
    left: np.ndarray
    height: np.ndarray
    width: np.ndarray
    found: np.ndarray


def _boxes(
    sizes: tuple[np.ndarray, np.ndarray], fits: np.ndarray, side: int, draws: Draws, top: int, left: int
) -> Boxes:
    """The first box of each sample that fits; `sizes` (heights, widths) and `fits` are (B, tries)."""
    found = np.asarray(fits.any(axis=1))
    first = (np.arange(len(fits)), fits.argmax(axis=1))
    height = np.where(found, sizes[0][first], side).astype(np.int64)
    width = np.where(found, sizes[1][first], side).astype(np.int64)
    return Boxes(draws.below(top, side - height + 1), draws.below(left, side - width + 1), height, width, found)


def crop_boxes(draws: Draws, side: int) -> Boxes:
    """Draw torchvision's RandomResizedCrop on a square of `side`; the whole square where no try fits."""
    area = side * side * (CROP_SCALE[0] + (CROP_SCALE[1] - CROP_SCALE[0]) * draws.uniform(_CROP_AREA, _TRIES))
    ratio = _ratios(*CROP_RATIO)[draws.bits(_CROP_RATIO, _TRIES) >> 16]
    width, height = np.rint(np.sqrt(area * ratio)), np.rint(np.sqrt(area / ratio))
    fits = (width > 0) & (width <= side) & (height > 0) & (height <= side)
    return _boxes((height, width), fits, side, draws, _CROP_TOP, _CROP_LEFT)


def erase_boxes(draws: Draws, side: int) -> Boxes:
    """Draw torchvision's RandomErasing on a square of `side`; `found`: the sample erases at all and a box fits."""
    span = ERASE_SCALE[1] - ERASE_SCALE[0]
    area = side * side * (ERASE_SCALE[0] + span * draws.uniform(_ERASE_AREA, _TRIES))
    ratio = _ratios(*ERASE_RATIO)[draws.bits(_ERASE_RATIO, _TRIES) >> 16]
    height, width = np.rint(np.sqrt(area * ratio)), np.rint(np.sqrt(area / ratio))
    boxes = _boxes((height, width), (height < side) & (width < side), side, draws, _ERASE_TOP, _ERASE_LEFT)
    applied = boxes.found & (draws.uniform(_ERASE)[:, 0] < ERASE_PROBABILITY)
    return Boxes(boxes.top, boxes.left, boxes.height, boxes.width, applied)


def flips(draws: Draws) -> np.ndarray:
    """Draw bool (B,): which samples are mirrored, one in two."""
    return draws.uniform(_FLIP)[:, 0] < 0.5
