"""Feeds a stage: shuffled rows of images, or of stored boundaries, loaded ahead of the step in the background."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from contextlib import closing
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from cache_store.prefetch import prefetch
from cache_store.reader import RowReader
from workers.chain import Boundary
from workers.data.images import ImageSource
from workers.optim import as_input
from workers.seeds import derive_seed
from workers.specs import Precision

#: Batches loaded ahead of the step. Two hide the loader's jitter; more only hold memory.
AHEAD = 2


class Inputs(Protocol):
    """Rows of one split as they enter a stage."""

    #: Batches to load ahead of the step in a background thread; 0 loads each in the step's own thread.
    ahead: int

    def load(self, rows: np.ndarray, view: int | None) -> Boundary:
        """Host tensors (len(rows), …) of these rows of the split; called from one thread."""

    def finish(self, boundary: Boundary) -> Boundary:
        """What is left to do on the device, in the step's own thread."""


class ImageInputs:
    """Augmented images; with a `prefix`, the frozen blocks run on the device for every batch (recompute)."""

    def __init__(
        self, images: ImageSource, device: torch.device, prefix: Callable[[Boundary], Boundary] | None = None
    ) -> None:
        # Augmenting computes. Beside a step on the same cores it would only take turns with it, with a second
        # pool of threads: measured 10% slower than one after the other on two cores.
        self.ahead = 0 if device.type == "cpu" else AHEAD
        self._images = images
        self._prefix = prefix

    def load(self, rows: np.ndarray, view: int | None) -> Boundary:
        return (self._images.batch(rows, view),)

    def finish(self, boundary: Boundary) -> Boundary:
        if self._prefix is None:
            return boundary
        with torch.no_grad():
            return self._prefix(boundary)


class SnapshotInputs:
    """Stored boundary rows, one reader a view, gathered into a ring of reused buffers.

    On a CUDA device every batch takes a fresh pinned buffer instead: torch's host allocator recycles it only
    once the asynchronous copy out of it has finished, which a ring of our own would have to track.
    """

    def __init__(self, readers: Mapping[int | None, RowReader], device: torch.device, precision: Precision) -> None:
        self.ahead = AHEAD  # reading mostly waits for the store
        self._readers = readers
        self._precision = precision
        self._pinned = device.type == "cuda"
        # One buffer being filled, AHEAD waiting, one in the step.
        self._ring: list[Boundary | None] = [None] * (AHEAD + 2)
        self._turn = 0

    def load(self, rows: np.ndarray, view: int | None) -> Boundary:
        reader = self._readers[view]
        if self._pinned:
            return reader.gather(rows, tuple(t.pin_memory() for t in reader.empty(len(rows))))
        self._turn = (self._turn + 1) % len(self._ring)
        buffer = self._ring[self._turn]
        if buffer is None or len(buffer[0]) < len(rows):
            buffer = self._ring[self._turn] = reader.empty(len(rows))
        return reader.gather(rows, tuple(tensor[: len(rows)] for tensor in buffer))

    def finish(self, boundary: Boundary) -> Boundary:
        return as_input(boundary, self._precision)


def epoch_order(seed: int, epoch: int, rows: int) -> np.ndarray:
    """A permutation of 0..rows-1 (int64): a function of (seed, epoch, rows) alone, the same in every regime."""
    return np.random.Generator(np.random.PCG64(derive_seed(seed, "order", epoch))).permutation(rows)


def steps_per_epoch(rows: int, batch_size: int, drop_last: bool) -> int:
    whole = rows // batch_size
    return max(1, whole) if drop_last else -(-rows // batch_size)


def batches(
    inputs: Inputs,
    labels: Tensor,
    order: np.ndarray,
    *,
    batch_size: int,
    view: int | None,
    steps: range,
    device: torch.device,
    channels_last: bool = False,
) -> Generator[tuple[int, Boundary, Tensor], None, None]:
    """(step, boundary on the device, labels (B,) int64 on the device) for every step of the range, in order."""

    def load() -> Generator[tuple[int, Boundary, Tensor], None, None]:
        if inputs.ahead and device.type == "cpu":
            torch.set_num_threads(1)  # of the background thread: the step computes on the same cores
        for step in steps:
            rows = order[step * batch_size : (step + 1) * batch_size]
            yield step, inputs.load(rows, view), labels[torch.from_numpy(rows)]

    memory_format = torch.channels_last if channels_last else torch.preserve_format
    with closing(prefetch(load(), inputs.ahead) if inputs.ahead else load()) as loaded:
        for step, host, host_labels in loaded:
            boundary = tuple(
                tensor.to(device, non_blocking=True, memory_format=memory_format)
                if tensor.ndim == 4
                else tensor.to(device, non_blocking=True)
                for tensor in host
            )
            yield step, inputs.finish(boundary), host_labels.to(device, non_blocking=True)
