"""Measure, on the slot where the work will be done, what a boundary costs to make, to read and to compute again.

The real blocks run over the first samples of the real data; rows of the boundary behind each are written to the store
of the run and read back. Seconds a sample; a median, so that a moment's load of the machine does not decide.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cache_store.errors import Interrupted
from cache_store.formats.codec import Array
from cache_store.formats.encoded_rows import EncodedRows
from cache_store.formats.torch_dtypes import TORCH
from cache_store.records.nodes import Attempt, Commit
from cache_store.snapshots.reader import RowReader
from cache_store.snapshots.spec import SetSpec
from cache_store.snapshots.store import SnapshotSet
from workers.control import Update
from workers.device import autocast
from workers.domains.registry import domain_of
from workers.environment import WorkerEnvironment
from workers.models.chain import Boundary, ModulePath
from workers.snapshots.boundary import to_numpy
from workers.specs.orders import Parents
from workers.specs.results import BlockCosts, LoadCosts, MeasuredCosts, MeasureResult
from workers.specs.tasks import MeasureTask
from workers.training.batches import gathering_clock
from workers.weights import Weights

#: Each figure: at least so many times, then until so many seconds are spent on it.
LEAST, MOST_S = 3, 0.5


def measure(task: MeasureTask, parents: Parents, environment: WorkerEnvironment, attempt: Attempt) -> Commit:
    """Measure, and commit the figures. Nothing but the commit stays in the store."""
    started = time.monotonic()
    figures = _Bench(task, parents, environment, attempt).run()
    result = MeasureResult(figures=figures, seconds=time.monotonic() - started, where=environment.where())
    return attempt.commit(result.to_json())


class _Bench:
    def __init__(
        self,
        task: MeasureTask,
        parents: Parents,
        environment: WorkerEnvironment,
        attempt: Attempt,
    ) -> None:
        self.task, self.environment, self.attempt = task, environment, attempt
        self.device = environment.device
        self.domain = domain_of(task.experiment)
        self.source = self.domain.source(parents["data"], environment.snapshots, "train")
        self.weights = Weights(environment.nodes, parents, self.domain, self.device)
        self.group = np.arange(min(task.group_rows, self.source.rows))
        self.batch = np.arange(min(task.batch_rows, self.source.rows))

    def run(self) -> MeasuredCosts:
        """Measure loading, then block after block. Interrupted when asked to stop."""
        load = LoadCosts(group=self._loading(self.group), batch=self._loading(self.batch))
        blocks: dict[str, BlockCosts] = {}
        rows: Boundary = ()
        for name, before in self.task.blocks:
            if self.environment.control.should_stop():
                raise Interrupted("measuring stopped; it starts again with the next run")
            blocks[name], rows = self._block(name, before, rows)
            self.environment.control.progress(
                Update(phase="measure", done=len(blocks), total=len(self.task.blocks), unit="blocks")
            )
        return MeasuredCosts(load=load, blocks=blocks)

    def _loading(self, index: np.ndarray) -> float:
        """Time loading; seconds a sample."""
        return self._seconds(lambda: self._load(index)) / len(index)

    def _load(self, index: np.ndarray) -> Boundary:
        return self.domain.load(self.source, self.domain.rows(self.source, index), 0)

    def _block(self, name: str, before: int, rows: Boundary) -> tuple[BlockCosts, Boundary]:
        """Measure one block; return its figures and what is behind it of the first samples. `rows`: what the block
        measured before it gave, which is as wide as this one's input: blocks between the two do the same work as one
        that was measured."""
        task, domain = self.task, self.domain
        started = time.perf_counter()
        module = ModulePath({name: self.weights.build(name)}, trained=())
        self._wait()
        build = time.perf_counter() - started
        encoding = EncodedRows(task.encoding, domain.fields(before + 1, task.dtype))

        def forward(index: np.ndarray, inputs: Boundary, *, in_batches: bool) -> Boundary:
            with torch.no_grad(), autocast(task.precision, self.device):
                batch = domain.batch(
                    domain.rows(self.source, index),
                    inputs,
                    stored=before > 0,
                    device=self.device,
                    precision=task.precision,
                    channels_last=in_batches and task.channels_last,
                )
                return domain.to_rows(module(batch.boundary, batch.context), batch)

        def kept(index: np.ndarray, inputs: Boundary) -> Boundary:
            outputs = [tensor.to(TORCH[task.dtype]) for tensor in forward(index, inputs, in_batches=False)]
            return tuple(tensor.to("cpu").contiguous() for tensor in encoding.encode(outputs))

        def of(index: np.ndarray) -> Boundary:
            return self._load(index) if before == 0 else tuple(tensor[: self._count(index)] for tensor in rows)

        batch, group, longest = of(self.batch), of(self.group), max(self.batch, self.group, key=len)
        in_batches = self._seconds(lambda: forward(self.batch, batch, in_batches=True)) / len(self.batch)
        if task.channels_last:
            module.to(memory_format=torch.channels_last)
        in_groups = self._seconds(lambda: kept(self.group, group)) / len(self.group)
        write, first, again = self._store(name, encoding, kept(self.group, group))
        figures = BlockCosts(build=build, group=in_groups, batch=in_batches, write=write, open=first, read=again)
        return figures, encoding.decode(kept(longest, of(longest)))

    def _count(self, index: np.ndarray) -> int:
        """Count the rows of a set that these samples are."""
        return len(self.domain.set_rows(self.source, index))

    def _store(self, name: str, encoding: EncodedRows, rows: Sequence[Tensor]) -> tuple[float, float, float]:
        """Return the seconds a sample to write rows of one full shard, to read them the first time, and again."""
        arrays = [to_numpy(tensor) for tensor in rows]
        size = sum(array.nbytes for array in arrays)
        wanted = min(self.task.shard_bytes, size * -(-self.source.rows // len(self.group)))
        copies = max(1, wanted // size)
        arrays = [np.concatenate([array] * copies) for array in arrays]
        samples = copies * len(self.group)
        written, opened = [], []
        for attempt in range(LEAST):
            key = {"kind": "measurement", "attempt": self.attempt.id, "block": name, "try": attempt}
            with self._scratch(key, encoding, arrays) as (target, seconds):
                written.append(seconds)
                # As a stage that starts: the shard is verified, and every page of it touched for the first time.
                again = _Gathering(self, SnapshotSet(target.storage, target.spec), encoding)
                opened.append(again.seconds())
                if attempt == LEAST - 1:
                    read = statistics.median(again.seconds() for _ in range(LEAST)) / samples
        return statistics.median(written) / samples, statistics.median(opened) / samples, read

    @contextmanager
    def _scratch(
        self, key: Mapping[str, Any], encoding: EncodedRows, arrays: Sequence[Array]
    ) -> Iterator[tuple[SnapshotSet, float]]:
        """Yield a set of one shard and the seconds it took to write; the set is deleted afterwards."""
        rows = len(arrays[0])
        spec = SetSpec(key, rows, encoding.fields, rows, rows, codec_version=encoding.codec_version)
        target = self.environment.snapshots.open(spec)
        try:
            started = time.perf_counter()
            target.put(0, arrays)
            yield target, time.perf_counter() - started
        finally:
            self.environment.snapshots.drop(spec.id)

    def _seconds(self, work: Callable[[], object]) -> float:
        """Return the median seconds of calls, without the first."""
        work()
        self._wait()
        taken: list[float] = []
        while len(taken) < LEAST or sum(taken) < MOST_S:
            started = time.perf_counter()
            work()
            self._wait()
            taken.append(time.perf_counter() - started)
        return statistics.median(taken)

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


class _Gathering:
    """Gather all samples of a measured set, shuffled, in training batches, decoded on the device: a pass of a stage."""

    def __init__(self, bench: _Bench, target: SnapshotSet, encoding: EncodedRows) -> None:
        self._device, self._decode = bench.device, encoding.decode
        self._reader = RowReader(target)
        period = bench._count(bench.group)
        draw = np.random.Generator(np.random.PCG64(0))
        self._batches = [
            bench.domain.set_rows(bench.source, index) + first
            for first in range(0, target.spec.rows, period)
            for index in np.array_split(draw.permutation(bench.group), -(-len(bench.group) // len(bench.batch)))
        ]
        self._buffer = self._reader.empty(max(map(len, self._batches)))

    def seconds(self) -> float:
        """Time one pass by the clocks of `StoredInputs`."""
        clock = gathering_clock(self._device)
        total = 0.0
        for rows in self._batches:
            started = clock()
            gathered = self._reader.gather(rows, tuple(tensor[: len(rows)] for tensor in self._buffer))
            total += clock() - started
            started = time.perf_counter()
            self._decode([tensor.to(self._device) for tensor in gathered])
            total += time.perf_counter() - started
        return total
