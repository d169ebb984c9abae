"""One boundary of the frozen prefix over one split and view: read where it is stored, computed where it is not."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cache_store.errors import ConfigError, CorruptShard, MissingShard, TrainingDiverged
from cache_store.formats.codec import Field
from cache_store.formats.encoded_rows import EncodedRows
from cache_store.formats.encodings import ENCODINGS
from cache_store.formats.torch_dtypes import BITS, TORCH
from cache_store.snapshots.reader import RowReader
from cache_store.snapshots.store import SnapshotSet
from workers.device import autocast
from workers.domains.base import Batch, Domain, Rows, Source
from workers.environment import WorkerEnvironment
from workers.models.chain import Boundary, ModulePath
from workers.snapshots.geometry import Geometry
from workers.specs.memory import FrozenTier
from workers.specs.results import SnapshotCounters
from workers.specs.tasks import BoundarySpec
from workers.weights import Weights, frozen_path

#: Threads that copy the rows of one batch where the step runs on a device.
GATHER_THREADS = 4


class StoredBoundary:
    """The snapshots of one boundary. Samples are always computed in the same groups of `group_rows` in data set
    order, each hop's output cast and encoded as it is stored, and the next hop computed from what that decodes to: a
    shard has the same bytes whether its predecessor was read, or computed again from the raw inputs."""

    def __init__(
        self,
        environment: WorkerEnvironment,
        domain: Domain,
        boundary: BoundarySpec,
        source: Source,
        weights: Weights,
        view: int | None,
        frozen: FrozenTier = "device",
    ) -> None:
        """`frozen`: where the weights of its blocks lie."""
        self._environment = environment
        self._domain = domain
        self._source = source
        self._weights = weights
        self._view = view
        self._boundary = boundary
        self._frozen: FrozenTier = frozen
        self._hop: ModulePath | None = None
        self._previous: StoredBoundary | None = None
        if len(boundary.hops) > 1:
            # The predecessor's shards are cut elsewhere, its groups are the same.
            shorter = replace(boundary, hops=boundary.hops[:-1])
            self._previous = StoredBoundary(environment, domain, shorter, source, weights, view, frozen)
        #: What a stored row is of a boundary row.
        self.encoding = encoding_of(domain, boundary)
        self.geometry = geometry_of(domain, boundary, source)
        key = boundary_key(domain, boundary, source, weights, view)
        self.spec = self.geometry.set_spec(key, self.encoding.fields, self.encoding.codec_version)
        #: Read as it is found: not created, and perhaps not there at all.
        self._stored = SnapshotSet(environment.storage, self.spec)
        self._set: SnapshotSet | None = None
        self._found: RowReader | None = None
        #: Samples each frozen block was run over by this object.
        self.forwards: Counter[str] = Counter()

    @property
    def snapshots(self) -> SnapshotSet:
        """The set, created in the store on first use."""
        if self._set is None:
            self._set = self._environment.snapshots.open(self.spec, self._environment.kept)
        return self._set

    @property
    def found(self) -> SnapshotSet:
        """The set as it is found: neither created nor, perhaps, there at all."""
        return self._stored

    @property
    def samples(self) -> int:
        return self._source.rows

    def reader(self, compute: Callable[[int], Sequence[np.ndarray]] | None = None) -> RowReader:
        """Rows of this boundary in any order; what is missing or damaged is computed (by `compute` in place of
        `compute_shard`), stored and served."""
        # On a CPU the step computes on the same cores.
        threads = 1 if self._environment.device.type == "cpu" else min(GATHER_THREADS, self._environment.threads)
        return RowReader(self.snapshots, compute=compute or self.compute_shard, threads=threads)

    def compute_shard(self, index: int, on_group: Callable[[], None] = lambda: None) -> list[np.ndarray]:
        """The shard's arrays, one per stored field, bf16 as uint16. `on_group` is called after each of its groups."""
        columns: list[list[Tensor]] = [[] for _ in self.spec.fields]
        with _threads(self._environment.threads):
            for group in self.geometry.groups_of_shard(index):
                for column, tensor in zip(columns, self._compute_group(group), strict=True):
                    column.append(tensor)
                on_group()
        return [to_numpy(torch.cat(column)) for column in columns]

    def activations(self, index: np.ndarray) -> tuple[Boundary, bool]:
        """What the stored rows of some samples (int64) decode to, on the host, and whether they were read. What the
        store does not have is computed for these samples alone, so that it equals what would have been stored up to
        rounding, and is not stored. For domains in which a sample is a row."""
        if self._found is None:
            self._found = RowReader(self._stored)
        try:
            return self.encoding.decode(self._found.gather(self._domain.set_rows(self._source, index))), True
        except (MissingShard, CorruptShard):
            rows = self._domain.rows(self._source, index)
            previous = self._previous
            inputs = (
                self._domain.load(self._source, rows, self._view)
                if previous is None
                else previous.activations(index)[0]
            )
            return self.encoding.decode(self._compute(rows, inputs)), False

    def let_go(self) -> None:
        """Drop the frozen blocks; they are loaded again when something is missing."""
        self._hop = None
        if self._previous is not None:
            self._previous.let_go()

    def _group(self, group: int) -> Boundary:
        """Stored rows of one group as host tensors: from the store if it is there."""
        rows = self.geometry.rows_of_group(group)
        shard = self.geometry.shard_of_group(group)
        first = rows.start - self.spec.shard_range(shard).start

        def copy(arrays: Sequence[np.ndarray]) -> Boundary:
            pairs = zip(arrays, self.spec.fields, strict=True)
            return tuple(_to_tensor(array[first : first + len(rows)], field) for array, field in pairs)

        try:
            return self._stored.read(shard, copy)
        except (MissingShard, CorruptShard):
            return self._compute_group(group)  # released, lost or damaged: its successor needs only these rows

    def _compute_group(self, group: int) -> Boundary:
        """Stored rows of one group, computed from what the stored rows before it decode to."""
        samples = self.geometry.samples_of_group(group)
        rows = self._domain.rows(self._source, np.arange(samples.start, samples.stop))
        previous = self._previous
        if previous is None:
            return self._compute(rows, self._domain.load(self._source, rows, self._view))
        return self._compute(rows, previous.encoding.decode(previous._group(group)))

    def _compute(self, rows: Rows, inputs: Boundary) -> Boundary:
        """Stored rows of some samples. `inputs`: raw, or what the stored rows before the last hop decode to."""
        device, domain = self._environment.device, self._domain
        if self._hop is None:
            blocks = self._boundary.hops[-1]
            self._hop = frozen_path(
                self._weights, blocks, device, tier=self._frozen, channels_last=self._boundary.channels_last
            )
        for block in self._boundary.hops[-1]:
            self.forwards[block] += len(rows.index)
        stored = self._previous is not None
        with torch.no_grad(), autocast(self._boundary.precision, device):
            batch: Batch = domain.batch(rows, inputs, stored=stored, device=device, precision=self._boundary.precision)
            outputs = domain.to_rows(self._hop(batch.boundary, batch.context), batch)
        stored_rows = self.encoding.encode([self._as_stored(tensor) for tensor in outputs])
        return tuple(tensor.to("cpu").contiguous() for tensor in stored_rows)

    def _as_stored(self, rows: Tensor) -> Tensor:
        """Cast rows of a boundary to the type that they are kept in.

        ConfigError: that type does not hold a value, which would become infinite. TrainingDiverged: a value is not
        finite as it comes.
        """
        dtype = TORCH[self._boundary.dtype]
        stored = rows.to(dtype)
        if math.isfinite(_largest(stored)):
            return stored
        block, largest = self._boundary.hops[-1][-1], _largest(rows)
        if math.isfinite(largest):
            raise ConfigError(
                f"snapshots.dtype: {self._boundary.dtype} holds values up to {torch.finfo(dtype).max:,.6g}, but behind "
                f"{block} there are some of {largest:,.6g}; allowed there: bfloat16, float32 (auto is the type of "
                "training.precision)",
                where="snapshots.dtype",
                value=self._boundary.dtype,
                allowed=["bfloat16", "float32"],
                boundary=block,
                largest=largest,
            )
        raise TrainingDiverged(
            f"the activations behind {block} are not finite, computed in {self._boundary.precision}; no snapshot of "
            "them is kept. Set training.precision to bf16 or fp32, or look at the weights before it",
            boundary=block,
        )

    def total_forwards(self) -> Counter[str]:
        """Samples each block was run over, this hop's and (after losses) earlier hops'."""
        earlier = self._previous.total_forwards() if self._previous is not None else Counter()
        return self.forwards + earlier


def encoding_of(domain: Domain, boundary: BoundarySpec) -> EncodedRows:
    return EncodedRows(boundary.encoding, domain.fields(sum(len(hop) for hop in boundary.hops), boundary.dtype))


def geometry_of(domain: Domain, boundary: BoundarySpec, source: Source) -> Geometry:
    """Where the samples of `source` lie in a set of this boundary, whether it is stored or not."""
    return Geometry.of(
        source.rows,
        domain.offsets(source),
        group=boundary.group_rows,
        row_bytes=sum(field.bytes for field in encoding_of(domain, boundary).fields),
        shard_bytes=boundary.shard_bytes,
    )


def boundary_key(
    domain: Domain, boundary: BoundarySpec, source: Source, weights: Weights, view: int | None
) -> dict[str, Any]:
    """Everything that determines the bytes of a snapshot set, by content: a changed input is another address."""
    encoding = ENCODINGS[boundary.encoding].identity()
    return {
        "kind": "boundary",
        "data": source.identity,
        "view": domain.view_identity(view),
        "hops": [[{"block": name, "state": weights.digest(name)} for name in hop] for hop in boundary.hops],
        "model": domain.model_identity(),
        "precision": boundary.precision,
        "channels_last": boundary.channels_last,
        **({} if encoding is None else {"encoding": encoding}),
        # Sets from before overflowing values were refused may hold infinities: they are not found again.
        **({"finite": 1} if boundary.dtype == "float16" else {}),
    }


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Bits depend on the thread count, and a thread that only reads ahead has set its own to one."""
    before = torch.get_num_threads()
    if before == count:
        yield
        return
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def to_numpy(tensor: Tensor) -> np.ndarray:
    """A host tensor as a set's array, bf16 and float8 as their bits."""
    return tensor.view(BITS.get(tensor.dtype, tensor.dtype)).numpy()


def _to_tensor(array: np.ndarray, field: Field) -> Tensor:
    # Mapped shards are read-only; the copy is what makes a tensor over them safe to hand to torch.
    tensor = torch.from_numpy(np.array(array))
    return tensor.view(TORCH[field.dtype])


def _largest(rows: Tensor) -> float:
    """Return the largest absolute value; not finite where one is not."""
    low, high = (float(end) for end in rows.aminmax())
    return math.nan if math.isnan(low) else max(-low, high)


def counters_of(found: SnapshotSet) -> SnapshotCounters:
    """What was found, read and written of a set by this object."""
    own = found.counters
    return SnapshotCounters(
        hits=own.hits, misses=own.misses, bytes_read=own.bytes_read, bytes_written=own.bytes_written
    )


def snapshot_counters(boundaries: Iterable[StoredBoundary]) -> SnapshotCounters:
    """Sum up what was found, read and written over the sets of a task."""
    total = SnapshotCounters()
    for boundary in boundaries:
        total += counters_of(boundary.snapshots)
    return total
