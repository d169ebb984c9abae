"""Feeds a stage: shuffled samples, raw or as stored boundaries, loaded ahead of the step in the background."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from contextlib import closing
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from cache_store.prefetch import prefetch
from cache_store.reader import RowReader
from workers.chain import Boundary
from workers.domains.base import Batch, Domain, Rows, Source
from workers.specs import Precision

#: Batches loaded ahead of the step. Two hide the loader's jitter; more only hold memory.
AHEAD = 2


class Inputs(Protocol):
    """Samples of one split as they enter a stage."""

    domain: Domain
    source: Source
    #: Batches to load ahead of the step in a background thread; 0 loads each in the step's own thread.
    ahead: int

    def load(self, rows: Rows, view: int | None) -> Boundary:
        """Host tensors of these samples; called from one thread."""

    def finish(self, rows: Rows, boundary: Boundary) -> Batch:
        """To the device, and what is left to do there, in the step's own thread."""


class RawInputs:
    """Images or tokens; with a `prefix`, the frozen blocks run on the device for every batch (recompute)."""

    def __init__(
        self,
        domain: Domain,
        source: Source,
        device: torch.device,
        precision: Precision,
        *,
        channels_last: bool = False,
        prefix: Callable[[Batch], Batch] | None = None,
    ) -> None:
        # Augmenting computes. Beside a step on the same cores it would only take turns with it, with a second
        # pool of threads: measured 10% slower than one after the other on two cores.
        self.ahead = 0 if device.type == "cpu" else AHEAD
        self.domain = domain
        self.source = source
        self._device = device
        self._precision: Precision = precision
        self._channels_last = channels_last
        self._prefix = prefix

    def load(self, rows: Rows, view: int | None) -> Boundary:
        return self.domain.load(self.source, rows, view)

    def finish(self, rows: Rows, boundary: Boundary) -> Batch:
        batch = self.domain.batch(
            rows,
            boundary,
            stored=False,
            device=self._device,
            precision=self._precision,
            channels_last=self._channels_last,
        )
        if self._prefix is None:
            return batch
        with torch.no_grad():
            return self._prefix(batch)


class StoredInputs:
    """Stored boundary rows, one reader a view, gathered into a ring of reused buffers.

    On a CUDA device every batch takes a fresh pinned buffer instead: torch's host allocator recycles it only
    once the asynchronous copy out of it has finished, which a ring of our own would have to track.
    """

    def __init__(
        self,
        domain: Domain,
        source: Source,
        readers: Mapping[int | None, RowReader],
        device: torch.device,
        precision: Precision,
        *,
        channels_last: bool = False,
    ) -> None:
        self.ahead = AHEAD  # reading mostly waits for the store
        self.domain = domain
        self.source = source
        self._readers = readers
        self._device = device
        self._precision: Precision = precision
        self._channels_last = channels_last
        # One buffer being filled, AHEAD waiting, one in the step.
        self._ring: list[Boundary | None] = [None] * (AHEAD + 2)
        self._turn = 0

    def load(self, rows: Rows, view: int | None) -> Boundary:
        reader = self._readers[view]
        wanted = self.domain.set_rows(self.source, rows.index)
        if self._device.type == "cuda":
            return reader.gather(wanted, tuple(t.pin_memory() for t in reader.empty(len(wanted))))
        self._turn = (self._turn + 1) % len(self._ring)
        buffer = self._ring[self._turn]
        if buffer is None or len(buffer[0]) < len(wanted):
            buffer = self._ring[self._turn] = reader.empty(len(wanted))
        return reader.gather(wanted, tuple(tensor[: len(wanted)] for tensor in buffer))

    def finish(self, rows: Rows, boundary: Boundary) -> Batch:
        return self.domain.batch(
            rows,
            boundary,
            stored=True,
            device=self._device,
            precision=self._precision,
            channels_last=self._channels_last,
        )


def steps_per_epoch(rows: int, batch_size: int, drop_last: bool) -> int:
    whole = rows // batch_size
    return max(1, whole) if drop_last else -(-rows // batch_size)


@dataclass(frozen=True)
class MicroBatch:
    """One of the micro-batches of a step; `share`: its part of the step's targets, `last`: the step ends with it."""

    step: int
    batch: Batch
    share: float
    last: bool


def micro_batches(
    inputs: Inputs,
    order: np.ndarray,
    *,
    batch_size: int,
    micro: int,
    view: int | None,
    steps: range,
    device: torch.device,
) -> Generator[MicroBatch, None, None]:
    """Every micro-batch of every step of the range, in order, on the device."""

    def load() -> Generator[tuple[int, Rows, Boundary, float, bool], None, None]:
        if inputs.ahead and device.type == "cpu":
            torch.set_num_threads(1)  # of the background thread: the step computes on the same cores
        for step in steps:
            index = order[step * batch_size : (step + 1) * batch_size]
            counts = inputs.domain.target_counts(inputs.source, index)
            total = max(1, int(counts.sum()))
            for first in range(0, len(index), micro):
                rows = inputs.domain.rows(inputs.source, index[first : first + micro])
                share = int(counts[first : first + micro].sum()) / total
                yield step, rows, inputs.load(rows, view), share, first + micro >= len(index)

    with closing(prefetch(load(), inputs.ahead) if inputs.ahead else load()) as loaded:
        for step, rows, boundary, share, last in loaded:
            yield MicroBatch(step, inputs.finish(rows, boundary), share, last)


def in_order(inputs: Inputs, *, batch_size: int, device: torch.device) -> Generator[Batch, None, None]:
    """The whole split in data set order under the evaluation view."""
    rows = inputs.source.rows
    steps = range(-(-rows // batch_size))
    loaded = micro_batches(
        inputs, np.arange(rows), batch_size=batch_size, micro=batch_size, view=None, steps=steps, device=device
    )
    with closing(loaded):
        for micro in loaded:
            yield micro.batch
