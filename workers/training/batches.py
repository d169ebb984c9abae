"""Load batches for a stage: shuffled samples, raw or as stored boundaries, loaded ahead of the step in the
background."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch

from cache_store.snapshots.reader import RowReader
from workers.device import pinned
from workers.distributed.gang import ALONE, Gang, Part
from workers.domains.base import Batch, Domain, Rows, Source
from workers.models.chain import Boundary
from workers.snapshots.geometry import Geometry
from workers.specs.experiment import Precision
from workers.training.clocks import DeviceClock
from workers.training.prefetch import prefetch
from workers.training.timing.stage_times import UNTIMED, Phases

#: Batches loaded ahead of the step. Two hide the loader's jitter; more only hold memory.
AHEAD = 2
#: Shards read ahead of the batch being loaded, where not all of a set is held.
SHARDS_AHEAD = 2


class Inputs(Protocol):
    """Load the samples of one split as they enter a stage."""

    domain: Domain
    source: Source
    #: Batches to load ahead of the step in a background thread; 0 loads each in the step's own thread.
    ahead: int
    #: Is told when `finish` copies a batch, and when it runs frozen blocks.
    times: Phases

    @property
    def seconds(self) -> float | None:
        """Count the seconds spent so far on loading and, where they are computed again, on the frozen blocks. Not for
        the step loop: it waits for the device. None: not known."""

    def expect(self, samples: np.ndarray, view: int | None) -> None:
        """Say which samples will be loaded from now on, in order."""

    def load(self, rows: Rows, view: int | None) -> Boundary:
        """Load host tensors of these samples; called from one thread."""

    def forget(self) -> None:
        """Drop what was expected."""

    def finish(self, rows: Rows, boundary: Boundary) -> Batch:
        """Move a batch to the device and do what is left to do there, in the step's own thread."""


class RawInputs:
    """Load images or tokens; with a `prefix`, the frozen blocks run on the device for every batch (recompute)."""

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
        self.times = UNTIMED
        self.domain = domain
        self.source = source
        self._device = device
        self._precision: Precision = precision
        self._channels_last = channels_last
        self._prefix = prefix
        self._seconds = 0.0
        self._on_device = DeviceClock(device)

    @property
    def seconds(self) -> float | None:
        return self._seconds + self._on_device.seconds()

    def expect(self, samples: np.ndarray, view: int | None) -> None:
        """Nothing to prepare."""

    def load(self, rows: Rows, view: int | None) -> Boundary:
        started = time.perf_counter()
        loaded = tuple(pinned(tensor, self._device) for tensor in self.domain.load(self.source, rows, view))
        self._seconds += time.perf_counter() - started
        return loaded

    def forget(self) -> None:
        """Nothing was prepared."""

    def finish(self, rows: Rows, boundary: Boundary) -> Batch:
        self.times.at("copies")
        started = time.perf_counter()
        batch = self.domain.batch(
            rows,
            boundary,
            stored=False,
            device=self._device,
            precision=self._precision,
            channels_last=self._channels_last,
        )
        if self._prefix is not None:
            self.times.at("prefix")
            with torch.no_grad(), self._on_device:
                batch = self._prefix(batch)
        # A device works on when the call returns: what it takes there its own clock says.
        if self._device.type == "cpu":
            self._seconds += time.perf_counter() - started
        return batch


class StoredInputs:
    """Load stored boundary rows, one reader a view, gathered into a ring of reused buffers.

    On a CUDA device every batch takes a fresh pinned buffer instead: torch's host allocator recycles it only
    once the asynchronous copy out of it has finished, which a ring of our own would have to track.
    """

    def __init__(
        self,
        domain: Domain,
        source: Source,
        readers: Mapping[int | None, RowReader],
        geometry: Geometry,
        device: torch.device,
        precision: Precision,
        *,
        channels_last: bool = False,
        decode: Callable[[Boundary], Boundary] = lambda stored: stored,
    ) -> None:
        self._decode = decode
        self.ahead = AHEAD  # reading mostly waits for the store
        self.times = UNTIMED
        self.domain = domain
        self.source = source
        self._readers = readers
        self._geometry = geometry
        self._device = device
        self._precision: Precision = precision
        self._channels_last = channels_last
        # One buffer being filled, AHEAD waiting, one in the step.
        self._ring: list[Boundary | None] = [None] * (AHEAD + 2)
        self._turn = 0
        self._loading = self._decoding = 0.0

    @property
    def seconds(self) -> float | None:
        """Count the seconds of gathering and decoding."""
        return self._loading + self._decoding

    def expect(self, samples: np.ndarray, view: int | None) -> None:
        reader = self._readers[view]
        reader.expect(self._geometry.shards_of(samples), depth=None if reader.snapshots.holds_all else SHARDS_AHEAD)

    def forget(self) -> None:
        for reader in self._readers.values():
            reader.forget()

    def load(self, rows: Rows, view: int | None) -> Boundary:
        clock = gathering_clock(self._device)
        started = clock()
        gathered = self._gather(rows, view)
        self._loading += clock() - started
        return gathered

    def _gather(self, rows: Rows, view: int | None) -> Boundary:
        reader = self._readers[view]
        wanted = self.domain.set_rows(self.source, rows.index)
        if self._device.type == "cuda":
            return reader.gather(wanted, reader.empty(len(wanted), pinned=True))
        self._turn = (self._turn + 1) % len(self._ring)
        buffer = self._ring[self._turn]
        if buffer is None or len(buffer[0]) < len(wanted):
            buffer = self._ring[self._turn] = reader.empty(len(wanted))
        return reader.gather(wanted, tuple(tensor[: len(wanted)] for tensor in buffer))

    def finish(self, rows: Rows, boundary: Boundary) -> Batch:
        self.times.at("copies")
        # On the device: what is copied there are the stored columns, fewer bytes than they decode to.
        moved = tuple(tensor.to(self._device, non_blocking=True) for tensor in boundary)
        started = time.perf_counter()
        decoded = self._decode(moved)
        self._decoding += time.perf_counter() - started
        return self.domain.batch(
            rows,
            decoded,
            stored=True,
            device=self._device,
            precision=self._precision,
            channels_last=self._channels_last,
        )


def gathering_clock(device: torch.device) -> Callable[[], float]:
    """What gathering in the background costs: beside a step on the same cores what it computes, not how long it waits
    for its turn; beside a device's step the time until it is done."""
    return time.thread_time if device.type == "cpu" else time.perf_counter


def steps_per_epoch(rows: int, batch_size: int, drop_last: bool) -> int:
    whole = rows // batch_size
    return max(1, whole) if drop_last else -(-rows // batch_size)


def samples_of_steps(steps: int, rows: int, batch_size: int, drop_last: bool) -> int:
    """Samples that the first `steps` steps of a stage take: the last batch of an epoch may be a smaller one."""
    epochs, rest = divmod(steps, steps_per_epoch(rows, batch_size, drop_last))
    whole = steps_per_epoch(rows, batch_size, drop_last) * batch_size
    return epochs * min(rows, whole) + min(rows, rest * batch_size)


@dataclass(frozen=True)
class MicroBatch:
    """One of the micro-batches of a step, or a rank's part of one; `share`: its part of the step's targets, `last`: the
    step ends with it."""

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
    gang: Gang = ALONE,
) -> Generator[MicroBatch, None, None]:
    """Iterate over every micro-batch of every step of the range, in order, on the device; of each this rank's part."""

    def load() -> Generator[tuple[int, Rows, Boundary, float, bool, Part], None, None]:
        if inputs.ahead and device.type == "cpu":
            torch.set_num_threads(1)  # of the background thread: the step computes on the same cores
        inputs.expect(_own(order[steps.start * batch_size : steps.stop * batch_size], batch_size, micro, gang), view)
        for step in steps:
            index = order[step * batch_size : (step + 1) * batch_size]
            counts = inputs.domain.target_counts(inputs.source, index)
            total = max(1, int(counts.sum()))
            for first in range(0, len(index), micro):
                part = gang.part(first, min(first + micro, len(index)))
                rows = inputs.domain.rows(inputs.source, index[part.rows])
                share = int(counts[part.rows].sum()) / total / part.copies
                yield step, rows, inputs.load(rows, view), share, first + micro >= len(index), part

    try:
        with closing(prefetch(load(), inputs.ahead) if inputs.ahead else load()) as loaded:
            for step, rows, boundary, share, last, part in loaded:
                batch = inputs.finish(rows, boundary)
                yield MicroBatch(step, batch if part.counts else replace(batch, counts=False), share, last)
    finally:
        inputs.forget()


def _own(samples: np.ndarray, batch_size: int, micro: int, gang: Gang) -> np.ndarray:
    """Pick the samples of some steps that this rank takes, in the order in which it does."""
    if gang.size == 1:
        return samples
    taken = []
    for start in range(0, len(samples), batch_size):
        step = samples[start : start + batch_size]
        taken += [step[gang.part(i, min(i + micro, len(step))).rows] for i in range(0, len(step), micro)]
    return np.concatenate(taken) if taken else samples


def in_order(
    inputs: Inputs, *, batch_size: int, device: torch.device, gang: Gang = ALONE
) -> Generator[Batch, None, None]:
    """Iterate over the whole split in data set order under the evaluation view; a rank's part of every batch."""
    rows = inputs.source.rows
    loaded = micro_batches(
        inputs,
        np.arange(rows),
        batch_size=batch_size,
        micro=batch_size,
        view=None,
        steps=range(-(-rows // batch_size)),
        device=device,
        gang=gang,
    )
    with closing(loaded):
        for micro in loaded:
            yield micro.batch
