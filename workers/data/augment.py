"""Views of images: every random choice is a function of (seed, sample, view) alone, applied to whole batches.

Two things make a view the same bits in any batch, on any number of threads:

- Draws come from hashing (seed, view, sample, number of the draw), not from a stream.
- Pixels pass through arithmetic that is exact, so no order of summation or vector width can show. Resizing
  and cropping are products with integer matrices (16-bit fixed point) held in float64, where every sum stays
  below 2^53; colour operations are integer arithmetic; geometric ones move whole pixels. Only the
  normalisation at the end rounds, element by element.

Against torchvision's uint8 kernels this differs by rounding only (2 grey levels at most for crops, which here
round once instead of after each of resize, crop and pass; 1 for colour; geometric operations and equalisation
are equal), which the tests check.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from cache_store.errors import ConfigError
from workers.data.inspect import resize_of
from workers.specs import DataSpec

#: Raise it when the same settings give other pixels: snapshots are addressed by it.
VERSION = 1

#: RandomResizedCrop of the paper: area and aspect ratio relative to the resized image.
CROP_SCALE = (0.6, 1.0)
CROP_RATIO = (3 / 4, 4 / 3)
#: RandomErasing of the paper.
ERASE_PROBABILITY = 0.25
ERASE_SCALE = (0.02, 0.2)
ERASE_RATIO = (0.3, 3.3)
#: RandAugment(2, 9): operations a sample; magnitude 9 of 31 bins, that is 9/30 of each operation's range.
RAND_OPS = 2

# Draws of a view by number. Crop and erase try up to _TRIES boxes, as torchvision does.
_TRIES = 10
_CROP_AREA, _CROP_RATIO, _CROP_TOP, _CROP_LEFT = 0, 10, 20, 21
_FLIP = 22
_OP, _SIGN = 24, 28
_ERASE, _ERASE_TOP, _ERASE_LEFT, _ERASE_AREA, _ERASE_RATIO = 32, 33, 34, 40, 50


# --- draws --------------------------------------------------------------------------------------------------


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
        """32 random bits as int64 (B, count): the draws `number` .. `number + count - 1`."""
        numbers = np.arange(number + 1, number + 1 + count, dtype=np.uint64)
        return (_mix(self._base[:, None] + numbers * _GOLDEN) >> np.uint64(32)).astype(np.int64)

    def uniform(self, number: int, count: int = 1) -> np.ndarray:
        """float64 (B, count) in [0, 1), multiples of 2^-32."""
        return self.bits(number, count) * 2.0**-32

    def below(self, number: int, bounds: np.ndarray | int) -> np.ndarray:
        """int64 (B,): uniform on 0 .. bounds - 1, bounds (B,) or one for all, at most 2^31."""
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
    """torchvision's RandomResizedCrop on a square of `side`; the whole square where no try fits."""
    area = side * side * (CROP_SCALE[0] + (CROP_SCALE[1] - CROP_SCALE[0]) * draws.uniform(_CROP_AREA, _TRIES))
    ratio = _ratios(*CROP_RATIO)[draws.bits(_CROP_RATIO, _TRIES) >> 16]
    width, height = np.rint(np.sqrt(area * ratio)), np.rint(np.sqrt(area / ratio))
    fits = (width > 0) & (width <= side) & (height > 0) & (height <= side)
    return _boxes((height, width), fits, side, draws, _CROP_TOP, _CROP_LEFT)


def erase_boxes(draws: Draws, side: int) -> Boxes:
    """torchvision's RandomErasing on a square of `side`; `found`: the sample erases at all and a box fits."""
    span = ERASE_SCALE[1] - ERASE_SCALE[0]
    area = side * side * (ERASE_SCALE[0] + span * draws.uniform(_ERASE_AREA, _TRIES))
    ratio = _ratios(*ERASE_RATIO)[draws.bits(_ERASE_RATIO, _TRIES) >> 16]
    height, width = np.rint(np.sqrt(area * ratio)), np.rint(np.sqrt(area / ratio))
    boxes = _boxes((height, width), (height < side) & (width < side), side, draws, _ERASE_TOP, _ERASE_LEFT)
    applied = boxes.found & (draws.uniform(_ERASE)[:, 0] < ERASE_PROBABILITY)
    return Boxes(boxes.top, boxes.left, boxes.height, boxes.width, applied)


def flips(draws: Draws) -> np.ndarray:
    """bool (B,): which samples are mirrored, one in two."""
    return draws.uniform(_FLIP)[:, 0] < 0.5


def rand_operations(draws: Draws, slot: int) -> tuple[np.ndarray, np.ndarray]:
    """RandAugment's operation in a slot: index in `OPERATIONS` int64 (B,) and whether it is negated (B,)."""
    return draws.below(_OP + slot, len(OPERATIONS)), draws.uniform(_SIGN + slot)[:, 0] < 0.5


# --- resize and crop ----------------------------------------------------------------------------------------

_ONE = 1 << 16  # fixed point of the resampling weights
_TABLE_BYTES = 256 << 20
_CHUNK_ELEMENTS = 1 << 22


def _triangle(inputs: int, outputs: int) -> np.ndarray:
    """Antialiased bilinear resampling (Pillow's and torchvision's) as a matrix, float64 (outputs, inputs)."""
    scale = inputs / outputs
    support = max(1.0, scale)
    centers = (np.arange(outputs) + 0.5) * scale
    distance = np.abs(np.arange(inputs) + 0.5 - centers[:, None]) / support
    weights = np.maximum(0.0, 1.0 - distance)
    result: np.ndarray = weights / weights.sum(axis=1, keepdims=True)
    return result


class Resampler:
    """Resize native -> `resize`, cut [offset, offset + length) out, resize that to `size`: along one axis
    this is one matrix. Those in use are kept as the few weights of each row that are not zero."""

    def __init__(self, native: int, resize: int, size: int) -> None:
        self.native, self.resize, self.size = native, resize, size
        self._resized = None if native == resize else _triangle(native, resize)
        # Half width, in native pixels, of what one output depends on.
        first = 0.0 if native == resize else max(1.0, native / resize)
        reach = first + max(1.0, resize / size) * native / resize
        self._taps = min(native, math.ceil(2 * reach) + 2)
        self._slot_of = np.zeros((resize + 1) ** 2, dtype=np.int32)  # key -> slot + 1; 0: not made yet
        self._forget()

    def _forget(self) -> None:
        self._slot_of[:] = 0
        self._used = 0
        self._starts = torch.empty(0, self.size, dtype=torch.int64)
        self._weights = torch.empty(0, self.size, self._taps, dtype=torch.float64)

    def matrices(self, offsets: np.ndarray, lengths: np.ndarray) -> Tensor:
        """float64 (B, size, native) for int64 (B,) offsets and lengths: integers that sum to 65,536 a row."""
        keys = offsets * (self.resize + 1) + lengths
        missing = np.unique(keys[self._slot_of[keys] == 0])
        if len(missing):
            self._add(missing, keys)
        slots = torch.from_numpy(self._slot_of[keys].astype(np.int64) - 1)
        index = self._starts[slots].unsqueeze(-1) + torch.arange(self._taps)
        dense = torch.zeros(len(keys), self.size, self.native, dtype=torch.float64)
        return dense.scatter_(2, index, self._weights[slots])

    def _add(self, missing: np.ndarray, keys: np.ndarray) -> None:
        if (self._used + len(missing)) * self.size * (self._taps + 1) * 8 > _TABLE_BYTES:
            self._forget()
            missing = np.unique(keys)
        needed = self._used + len(missing)
        if needed > len(self._starts):
            capacity = max(needed, 2 * len(self._starts), 64)
            starts = torch.empty(capacity, self.size, dtype=torch.int64)
            weights = torch.empty(capacity, self.size, self._taps, dtype=torch.float64)
            starts[: self._used] = self._starts[: self._used]
            weights[: self._used] = self._weights[: self._used]
            self._starts, self._weights = starts, weights
        for key in missing.tolist():  # once a geometry, not once a sample
            start, weight = self._compact(*divmod(key, self.resize + 1))
            self._starts[self._used] = torch.from_numpy(start)
            self._weights[self._used] = torch.from_numpy(weight)
            self._used += 1
            self._slot_of[key] = self._used

    def _compact(self, offset: int, length: int) -> tuple[np.ndarray, np.ndarray]:
        cut = _triangle(length, self.size)
        if self._resized is None:
            full = np.zeros((self.size, self.native))
            full[:, offset : offset + length] = cut
        else:
            # einsum's own loop, not BLAS: one order of summation whatever the number of threads.
            full = np.einsum("sl,ln->sn", cut, self._resized[offset : offset + length])
        weights = np.rint(full * _ONE)
        rows = np.arange(self.size)
        weights[rows, weights.argmax(axis=1)] += _ONE - weights.sum(axis=1)
        start = np.minimum((weights > 0).argmax(axis=1), self.native - self._taps)
        taps = weights[rows[:, None], start[:, None] + np.arange(self._taps)]
        assert (taps.sum(axis=1) == _ONE).all(), "a resampling row is wider than its taps"
        return start.astype(np.int64), taps

    @staticmethod
    def apply(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        """uint8 (B, C, N, N) -> uint8 (B, C, S, S); `rows` and `columns` (B or 1, S, N) resample y and x."""
        count, channels, native = images.shape[0], images.shape[1], images.shape[2]
        size = rows.shape[1]
        out = torch.empty(count, channels, size, size, dtype=torch.uint8)
        step = max(1, _CHUNK_ELEMENTS // (channels * native * native))
        for start in range(0, count, step):
            part = slice(start, start + step)
            y = rows if len(rows) == 1 else rows[part]
            x = columns if len(columns) == 1 else columns[part]
            pixels = images[part].to(torch.float64)
            across = torch.matmul(pixels.flatten(1, 2), x.transpose(1, 2))
            both = torch.matmul(y.unsqueeze(1), across.view(len(pixels), channels, native, size))
            out[part] = both.mul_(1 / (_ONE * _ONE)).round_()
        return out


# --- RandAugment --------------------------------------------------------------------------------------------
# Operations take and return uint8 (B, 3, S, S). `negative` selects the sign where an operation has one.
# Factors are exact hundredths: magnitude 9 of 0..30 on a range of 0.9 is 0.27.

_LEVEL = 27


def _clamped(value: Tensor) -> Tensor:
    return value.clamp_(0, 255).to(torch.uint8)


def _blend(images: Tensor, others: Tensor | int, negative: bool, unit: int = 1) -> Tensor:
    """floor(images + f * (images - others / unit)), f = ±0.27, clamped; int64 inside where unit is not 1."""
    factor = -_LEVEL if negative else _LEVEL
    wide = images.to(torch.int32 if unit == 1 else torch.int64)
    mixed = wide * ((100 + factor) * unit) - others * factor
    return _clamped(mixed.div_(100 * unit, rounding_mode="floor"))


def _grey(images: Tensor) -> Tensor:
    """floor(0.2989 R + 0.587 G + 0.114 B), int32 (B, 1, S, S)."""
    red, green, blue = images.to(torch.int32).unbind(1)
    return ((red * 2989 + green * 5870 + blue * 1140) // 10000).unsqueeze(1)


def _brightness(images: Tensor, negative: bool) -> Tensor:
    return _blend(images, 0, negative)


def _color(images: Tensor, negative: bool) -> Tensor:
    return _blend(images, _grey(images), negative)


def _contrast(images: Tensor, negative: bool) -> Tensor:
    total = _grey(images).sum(dim=(1, 2, 3), keepdim=True, dtype=torch.int64)
    return _blend(images, total, negative, unit=images.shape[-1] * images.shape[-2])


def _sharpness(images: Tensor, negative: bool) -> Tensor:
    wide = images.to(torch.int32)
    rows = wide[:, :, :-2] + wide[:, :, 1:-1] + wide[:, :, 2:]
    inner = wide[:, :, 1:-1, 1:-1]
    total = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:] + 4 * inner
    blurred = (2 * total + 13) // 26  # total / 13, rounded
    out = images.clone()
    out[:, :, 1:-1, 1:-1] = _blend(images[:, :, 1:-1, 1:-1], blurred, negative)
    return out


def _posterize(images: Tensor, negative: bool) -> Tensor:
    return images & 0xFE  # 7 bits: 8 - round(9 / 30 * 4)


def _solarize(images: Tensor, negative: bool) -> Tensor:
    return torch.where(images >= 179, 255 - images, images)  # from 0.7 * 255 = 178.5 on


def _autocontrast(images: Tensor, negative: bool) -> Tensor:
    wide = images.to(torch.int32)
    low, high = wide.amin((-2, -1), keepdim=True), wide.amax((-2, -1), keepdim=True)
    flat = low == high
    scaled = (wide - low) * 255 // (high - low).masked_fill_(flat, 1)
    return _clamped(torch.where(flat, wide, scaled))


def _equalize(images: Tensor, negative: bool) -> Tensor:
    equalized: Tensor = F.equalize(images)  # integers throughout
    return equalized


def _identity(images: Tensor, negative: bool) -> Tensor:
    return images


Geometry = Literal["shear_x", "shear_y", "translate_x", "translate_y", "rotate"]


@lru_cache(maxsize=64)
def _moves(kind: Geometry, side: int, negative: bool) -> tuple[Tensor, Tensor]:
    """Where each pixel of a square comes from, nearest: index int64 (side*side,) and bool: from outside."""
    sign = -1 if negative else 1
    y, x = (axis - (side - 1) / 2 for axis in np.mgrid[0:side, 0:side].astype(np.float64))
    shear = sign * 0.09  # 9/30 of 0.3, about the upper left corner
    shift = sign * (45 * side // 331)  # 9/30 of 150/331 of the side, whole pixels
    angle = math.radians(sign * 9.0)  # 9/30 of 30 degrees
    source: dict[Geometry, tuple[np.ndarray, np.ndarray]] = {
        "shear_x": (y, x + shear * (y + side / 2)),
        "shear_y": (y + shear * (x + side / 2), x),
        "translate_x": (y, x - shift),
        "translate_y": (y - shift, x),
        "rotate": (math.sin(angle) * x + math.cos(angle) * y, math.cos(angle) * x - math.sin(angle) * y),
    }
    rows, columns = (np.rint(axis + (side - 1) / 2).astype(np.int64) for axis in source[kind])
    outside = (rows < 0) | (rows >= side) | (columns < 0) | (columns >= side)
    index = np.where(outside, 0, rows * side + columns)
    return torch.from_numpy(index.ravel()), torch.from_numpy(outside.ravel())


def _move(kind: Geometry) -> Callable[[Tensor, bool], Tensor]:
    def apply(images: Tensor, negative: bool) -> Tensor:
        index, outside = _moves(kind, images.shape[-1], negative)
        moved = images.flatten(2).index_select(2, index).masked_fill_(outside, 0)
        return moved.view(images.shape)

    return apply


@dataclass(frozen=True)
class Operation:
    """One of RandAugment's operations at magnitude 9; `signed` ones go either way with equal chance."""

    name: str
    signed: bool
    apply: Callable[[Tensor, bool], Tensor]


#: torchvision's space of operations, in its order.
OPERATIONS: tuple[Operation, ...] = (
    Operation("Identity", False, _identity),
    Operation("ShearX", True, _move("shear_x")),
    Operation("ShearY", True, _move("shear_y")),
    Operation("TranslateX", True, _move("translate_x")),
    Operation("TranslateY", True, _move("translate_y")),
    Operation("Rotate", True, _move("rotate")),
    Operation("Brightness", True, _brightness),
    Operation("Color", True, _color),
    Operation("Contrast", True, _contrast),
    Operation("Sharpness", True, _sharpness),
    Operation("Posterize", False, _posterize),
    Operation("Solarize", False, _solarize),
    Operation("AutoContrast", False, _autocontrast),
    Operation("Equalize", False, _equalize),
)


def rand_augment(images: Tensor, draws: Draws) -> Tensor:
    """RandAugment(2, 9), in place on uint8 (B, 3, S, S): one call an operation and sign that occurs."""
    for slot in range(RAND_OPS):
        operations, negative = rand_operations(draws, slot)
        group = operations * 2 + (negative & _SIGNED[operations])
        order = np.argsort(group, kind="stable")
        found, starts = np.unique(group[order], return_index=True)
        for code, members in zip(found.tolist(), np.split(order, starts[1:]), strict=True):
            operation = OPERATIONS[code // 2]
            if operation.apply is not _identity:
                index = torch.from_numpy(members)
                images[index] = operation.apply(images[index], bool(code % 2))
    return images


_SIGNED = np.array([operation.signed for operation in OPERATIONS])


# --- identity ---------------------------------------------------------------------------------------------


def view_identity(data: DataSpec, seed: int, view: int | None) -> dict[str, Any]:
    """Everything besides the stored images that determines the pixels of a view: part of snapshot addresses."""
    evaluation = view is None or data.augment == "none"
    return {
        "version": VERSION,
        "augment": "none" if evaluation else data.augment,
        "size": data.image_size,
        "resize": resize_of(data),
        **({} if evaluation else {"flip": data.flip, "seed": seed, "view": view}),
    }


# --- the whole --------------------------------------------------------------------------------------------


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
        """uint8 (B, 3, native, native) -> float32 (B, 3, size, size), contiguous.

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
