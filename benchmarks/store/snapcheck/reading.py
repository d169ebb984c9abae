"""Our reader and writer beside the system calls that they cannot do without."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from benchmarks.harness import Json
from benchmarks.store.snapcheck.activations import Activations
from benchmarks.store.snapcheck.timing import compare, drop_from_memory, timed
from cache_store.formats import codec
from cache_store.formats.codec import Array
from cache_store.records import files
from cache_store.snapshots.reader import RowReader
from cache_store.snapshots.store import SnapshotSet, SnapshotStore
from cache_store.storage.open import open_storage
from workers.training.shuffle import epoch_order, windowed_order

BATCH_BYTES = 16 << 20
#: Kernel's limit of one read.
_PIECE = 16 << 20


class Reading:
    """One set on disk, and the ways to read it."""

    def __init__(self, activations: Activations, folder: Path) -> None:
        self.activations = activations
        self.folder = folder
        self.snapshots = activations.store(folder / "store")
        self.spec = self.snapshots.spec
        self.shard_samples = np.diff(activations.cuts())
        self.paths = [path for path, _ in self._files()]
        rows = BATCH_BYTES // self.spec.row_bytes
        #: Room for a batch: filled once, so that its pages are there.
        self.out = (torch.zeros((rows + 4096, *activations.field.shape), dtype=torch.bfloat16),)
        mean = activations.rows / activations.samples
        self.batch = max(1, int(rows / mean * 0.9))

    def _files(self) -> Iterator[tuple[Path, int]]:
        for shard in range(self.spec.shards):
            raw = (self.folder / "store" / "sets" / self.spec.id / "commits" / f"{shard:06d}.json").read_bytes()
            record = self.snapshots.record(shard, raw)
            yield self.folder / "store" / record.path, record.bytes

    # -- orders -------------------------------------------------------------------------------------------

    def within(self, epoch: int) -> Array:
        return windowed_order(0, epoch, self.shard_samples, 1)

    def globally(self, epoch: int) -> Array:
        return epoch_order(0, epoch, self.activations.samples)

    # -- ours ---------------------------------------------------------------------------------------------

    def fresh(self, threads: int = 1) -> RowReader:
        """A reader that has read nothing, in a process that has checked nothing."""
        with files._verified_lock:
            files._verified.clear()
        return RowReader(SnapshotSet(self.snapshots.storage, self.spec), threads=threads)

    def epoch(self, reader: RowReader, order: Array) -> None:
        """All samples once, in batches into one buffer, as a stage reads them."""
        shard_of = np.searchsorted(self.activations.cuts(), order, side="right") - 1
        reader.expect(shard_of)
        for start in range(0, len(order), self.batch):
            reader.gather(self.activations.rows_of(order[start : start + self.batch]), self.out)
        reader.forget()

    @property
    def _view(self) -> memoryview:
        return self.out[0].view(torch.uint8).numpy().reshape(-1).data

    # -- the system's -------------------------------------------------------------------------------------

    def preadv(self) -> None:
        """Every file whole, in pieces into one buffer."""
        buffer = self._view[:_PIECE]
        for path in self.paths:
            descriptor = os.open(path, os.O_RDONLY)
            place = 0
            while count := os.preadv(descriptor, [buffer], place):
                place += count
            os.close(descriptor)

    def preadv_samples(self, order: Array) -> None:
        """Every sample by a read of its own, in this order, into the places of a batch."""
        buffer = self._view
        descriptors = [os.open(path, os.O_RDONLY) for path in self.paths]
        first, row = self.activations.starts, self.spec.row_bytes
        shard_of = np.searchsorted(self.activations.cuts(), order, side="right") - 1
        begins = [self.spec.shard_range(shard).start for shard in range(self.spec.shards)]
        for start in range(0, len(order), self.batch):
            place = 0
            for sample, shard in zip(
                order[start : start + self.batch], shard_of[start : start + self.batch], strict=True
            ):
                size = int(first[sample + 1] - first[sample]) * row
                offset = self.body + (int(first[sample]) - begins[shard]) * row
                os.preadv(descriptors[shard], [buffer[place : place + size]], offset)
                place += size
        for descriptor in descriptors:
            os.close(descriptor)

    @cached_property
    def body(self) -> int:
        """Where the values begin in every file."""
        pieces = codec.encode(self.spec.fields, (self.activations.values(self.spec.shard_range(0)),))
        sizes = [memoryview(piece).nbytes for piece in pieces]
        return sum(sizes[: sizes.index(max(sizes))])

    def in_memory(self) -> torch.Tensor:
        """The whole set as one tensor (rows, *shape)."""
        whole = torch.empty((self.spec.rows, *self.activations.field.shape), dtype=torch.bfloat16)
        target = whole.view(torch.int16).numpy().view(np.uint16)
        for shard in range(self.spec.shards):
            rows = self.spec.shard_range(shard)
            target[rows.start : rows.stop] = self.activations.values(rows)
        return whole

    def memcpy(self, whole: torch.Tensor) -> None:
        step = self.batch_rows
        for start in range(0, len(whole), step):
            piece = whole[start : start + step]
            self.out[0][: len(piece)].copy_(piece)

    @property
    def batch_rows(self) -> int:
        return BATCH_BYTES // self.spec.row_bytes

    def memory_gather(self, whole: torch.Tensor, order: Array) -> None:
        for start in range(0, len(order), self.batch):
            rows = torch.from_numpy(self.activations.rows_of(order[start : start + self.batch]))
            torch.index_select(whole, 0, rows, out=self.out[0][: len(rows)])


def measure(reading: Reading, rounds: int) -> Json:
    """The rows of the table that need nothing but a disk."""
    torch.set_num_threads(1)  # what a loader has beside a step on the same cores; the same for every case
    return {**_warm(reading, rounds), **_disk(reading, rounds)}


def _warm(reading: Reading, rounds: int) -> Json:
    size = reading.spec.bytes
    whole = reading.in_memory()
    warm = reading.fresh()
    turn = iter(range(10**6))
    reading.epoch(warm, reading.within(next(turn)))

    def first_touch(order: Callable[[int], Array]) -> float:
        reader, chosen = reading.fresh(), order(next(turn))
        return timed(lambda: reading.epoch(reader, chosen))

    def later(order: Callable[[int], Array]) -> float:
        chosen = order(next(turn))
        return timed(lambda: reading.epoch(warm, chosen))

    def sample_by_sample() -> float:
        chosen = reading.within(next(turn))
        return timed(lambda: reading.preadv_samples(chosen))

    def from_memory() -> float:
        chosen = reading.globally(next(turn))
        return timed(lambda: reading.memory_gather(whole, chosen))

    return {
        "within": compare(
            {
                "ours": lambda: later(reading.within),
                "ours, first touch": lambda: first_touch(reading.within),
                "preadv": lambda: timed(reading.preadv),
                "preadv of each sample": sample_by_sample,
                "memcpy": lambda: timed(lambda: reading.memcpy(whole)),
            },
            size,
            rounds,
        ),
        "global": compare(
            {
                "ours": lambda: later(reading.globally),
                "ours, first touch": lambda: first_touch(reading.globally),
                "gather from memory": from_memory,
            },
            size,
            rounds,
        ),
    }


def _disk(reading: Reading, rounds: int) -> Json:
    size = reading.spec.bytes
    turn = iter(range(10**6))

    def cold(work: Callable[[], object]) -> float:
        drop_from_memory(reading.paths)
        return timed(work)

    def ours_cold() -> float:
        reader, chosen = reading.fresh(), reading.within(next(turn))
        return cold(lambda: reading.epoch(reader, chosen))

    writes = {"ours": lambda: _write(reading), "write": lambda: _raw_write(reading)}
    return {
        "cold": compare({"ours": ours_cold, "preadv": lambda: cold(reading.preadv)}, size, rounds),
        "write": compare(writes, size, rounds),
    }


def _arrays(reading: Reading) -> list[Array]:
    return [reading.activations.values(reading.spec.shard_range(i)) for i in range(reading.spec.shards)]


def _write(reading: Reading) -> float:
    folder = reading.folder / "written"
    arrays = _arrays(reading)
    snapshots = SnapshotStore(open_storage(str(folder))).open(reading.spec)

    def work() -> None:
        for shard, array in enumerate(arrays):
            snapshots.put(shard, (array,))

    seconds = timed(work)
    shutil.rmtree(folder)
    return seconds


def _raw_write(reading: Reading) -> float:
    folder = reading.folder / "raw"
    folder.mkdir()
    arrays = _arrays(reading)

    def work() -> None:
        for shard, array in enumerate(arrays):
            descriptor = os.open(folder / str(shard), os.O_WRONLY | os.O_CREAT, 0o600)
            for piece in codec.encode(reading.spec.fields, (array,)):
                view = memoryview(piece)
                while view.nbytes:
                    view = view[os.write(descriptor, view) :]
            os.fsync(descriptor)
            os.close(descriptor)

    seconds = timed(work)
    shutil.rmtree(folder)
    return seconds
