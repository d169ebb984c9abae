"""Views of images: every random choice is a function of (seed, sample, view) alone, applied to whole batches.

Two things make a view the same bits in any batch, on any number of threads:

- Draws come from hashing (seed, view, sample, number of the draw), not from a stream (`draws`).
- Pixels pass through arithmetic that is exact, so no order of summation or vector width can show. Resizing
  and cropping are products with integer matrices (`resample`), colour operations are integer arithmetic and
  geometric ones move whole pixels (`rand_augment`). Only the normalisation at the end rounds, element by
  element.

Against torchvision's uint8 kernels this differs by rounding only (2 grey levels at most for crops, which here
round once instead of after each of resize, crop and pass; 1 for colour; geometric operations and equalisation
are equal), which the tests check.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from cache_store.errors import ConfigError
from workers.data.images.augment.draws import Draws, crop_boxes, erase_boxes, flips
from workers.data.images.augment.rand_augment import rand_augment
from workers.data.images.augment.resample import Resampler
from workers.data.images.inspect import resize_of
from workers.specs.experiment import ImageSpec

#: Raise it when the same settings give other pixels: snapshots are addressed by it.
VERSION = 1


def view_identity(data: ImageSpec, seed: int, view: int | None) -> dict[str, Any]:
    """Return everything besides the stored images that determines the pixels of a view: part of snapshot addresses."""
    evaluation = view is None or data.augment == "none"
    return {
        "version": VERSION,
        "augment": "none" if evaluation else data.augment,
        "size": data.image_size,
        "resize": resize_of(data),
        **({} if evaluation else {"flip": data.flip, "seed": seed, "view": view}),
    }


class Augment:
    """Images as stored -> normalised input of a model, for one data set and one seed.

    `paper`: resize, RandomResizedCrop(0.6..1), flip, RandAugment(2, 9), normalise, RandomErasing(0.25).
    `light`: resize, the same crop, flip, normalise. `none`: every view is the evaluation transform, which is
    resize, centre crop, normalise. Not for use by two threads at once (it caches resampling weights).
    """

    def __init__(
        self,
        *,
        augment: Literal["paper", "light", "none"],
        native: int,
        resize: int,
        size: int,
        flip: bool,
        mean: Sequence[float],
        std: Sequence[float],
        seed: int,
    ) -> None:
        """`native`, `resize`, `size`: sides in pixels. Raises ConfigError when `resize` is below `size`."""
        if resize < size:
            raise ConfigError(f"data.resize: {resize} is smaller than the crop; allowed: {size} or more")
        self._augment, self._flip, self._seed = augment, flip, seed
        self._size, self._resize = size, resize
        self._resampler = Resampler(native, resize, size)
        self._offset = round((resize - size) / 2.0)  # of the centre crop, as torchvision rounds it
        self._center: Tensor | None = None
        if native != resize:
            # The crop at its own size: resampling `size` pixels to `size` leaves them as they are.
            self._center = self._resampler.matrices(np.array([self._offset]), np.array([size]))
        mean_C, std_C = (torch.tensor(v, dtype=torch.float64).view(1, -1, 1, 1) for v in (mean, std))
        self._shift = (255 * mean_C).to(torch.float32)
        self._factor = (1 / (255 * std_C)).to(torch.float32)

    @torch.no_grad()
    def __call__(self, images: Tensor, samples: np.ndarray, view: int | None) -> Tensor:
        """Turn uint8 (B, 3, native, native) into float32 (B, 3, size, size), contiguous.

        `samples`: int64 (B,), rows of the prepared set. `view` None: the evaluation transform.
        """
        if view is None or self._augment == "none" or not len(samples):
            return self._normalise(self._evaluation(images))
        draws = Draws(self._seed, samples, view)
        pixels = self._crop(images, draws)
        if self._augment == "light":
            return self._normalise(pixels)
        return _erase(self._normalise(rand_augment(pixels, draws)), draws)

    def _evaluation(self, images: Tensor) -> Tensor:
        if self._center is None:
            cut = slice(self._offset, self._offset + self._size)
            return images[:, :, cut, cut]
        return Resampler.apply(images, self._center, self._center)

    def _crop(self, images: Tensor, draws: Draws) -> Tensor:
        boxes = crop_boxes(draws, self._resize)
        rows = self._resampler.matrices(boxes.top, boxes.height)
        columns = self._resampler.matrices(boxes.left, boxes.width)
        if self._flip:
            mirrored = torch.from_numpy(np.flatnonzero(flips(draws)))
            columns[mirrored] = columns[mirrored].flip(1)
        return Resampler.apply(images, rows, columns)

    def _normalise(self, images: Tensor) -> Tensor:
        wide = images.to(torch.float32, memory_format=torch.contiguous_format)
        return wide.sub_(self._shift).mul_(self._factor)


def _erase(images: Tensor, draws: Draws) -> Tensor:
    """Zero a box in a quarter of the samples, in place on float32 (B, C, S, S)."""
    side = images.shape[-1]
    boxes = erase_boxes(draws, side)
    index = np.flatnonzero(boxes.found)
    if len(index):
        across = np.arange(side)
        y = _inside(across, boxes.top[index], boxes.height[index])
        x = _inside(across, boxes.left[index], boxes.width[index])
        mask = torch.from_numpy(y[:, None, :, None] & x[:, None, None, :])
        where = torch.from_numpy(index)
        images[where] = images[where].masked_fill_(mask, 0.0)
    return images


def _inside(across: np.ndarray, start: np.ndarray, length: np.ndarray) -> np.ndarray:
    result: np.ndarray = (across >= start[:, None]) & (across < (start + length)[:, None])
    return result
