"""Resize, crop and resize again as one product with integer matrices, exact whatever the batch.

The matrices hold 16-bit fixed point weights in float64, where every sum stays below 2^53.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

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
        """Make the float64 (B, size, native) for int64 (B,) offsets and lengths: integers that sum to 65,536 a row."""
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
        """Resample uint8 (B, C, N, N) to uint8 (B, C, S, S); `rows` and `columns` (B or 1, S, N) resample y and x."""
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
