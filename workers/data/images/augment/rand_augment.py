"""RandAugment(2, 9): its operations on whole batches, and which of them a sample gets.

Colour operations are integer arithmetic, geometric ones move whole pixels, so a result does not depend on the
batch. Operations take and return uint8 (B, 3, S, S). `negative` selects the sign where an operation has one.
Factors are exact hundredths: magnitude 9 of 0..30 on a range of 0.9 is 0.27.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from workers.data.images.augment.draws import OPERATION, SIGN, Draws

#: RandAugment(2, 9): operations a sample; magnitude 9 of 31 bins, that is 9/30 of each operation's range.
RAND_OPS = 2

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


def rand_operations(draws: Draws, slot: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw RandAugment's operation in a slot: index in `OPERATIONS` int64 (B,) and whether it is negated (B,)."""
    return draws.below(OPERATION + slot, len(OPERATIONS)), draws.uniform(SIGN + slot)[:, 0] < 0.5


def rand_augment(images: Tensor, draws: Draws) -> Tensor:
    """Apply RandAugment(2, 9) in place on uint8 (B, 3, S, S): one call an operation and sign that occurs."""
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
