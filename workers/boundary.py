"""One boundary of the frozen prefix over one split and view: read where it is stored, computed where it is not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cache_store.errors import CorruptShard, MissingShard
from cache_store.reader import RowReader
from cache_store.snapshots import Field, SetSpec, SnapshotSet
from workers import models
from workers.chain import Boundary, Path
from workers.data.augment import view_identity
from workers.data.images import ImageSource
from workers.environment import WorkerEnvironment
from workers.optim import as_input, autocast
from workers.specs import BoundarySpec, Experiment, rows_per_shard
from workers.weights import Weights

TORCH_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class StoredBoundary:
    """The snapshots of one boundary. Samples are always computed in the same groups of `group_rows` in data set
    order, each hop's output cast to the stored dtype: a shard has the same bytes whether its predecessor was read,
    or computed again from the images."""

    def __init__(
        self,
        environment: WorkerEnvironment,
        experiment: Experiment,
        boundary: BoundarySpec,
        images: ImageSource,
        weights: Weights,
        view: int | None,
    ) -> None:
        self._environment = environment
        self._images = images
        self._weights = weights
        self._view = view
        self._boundary = boundary
        self._hop: Path | None = None
        self._previous: StoredBoundary | None = None
        if len(boundary.hops) > 1:
            # The predecessor's shards are cut elsewhere, its groups are the same.
            shorter = replace(boundary, hops=boundary.hops[:-1])
            self._previous = StoredBoundary(environment, experiment, shorter, images, weights, view)
        fields = _fields(experiment, boundary)
        self.spec = SetSpec(
            key=boundary_key(experiment, boundary, images, weights, view),
            rows=images.rows,
            fields=fields,
            group_rows=boundary.group_rows,
            shard_rows=rows_per_shard(sum(field.bytes for field in fields), boundary.shard_bytes, boundary.group_rows),
        )
        #: Read as it is found: not created, and perhaps not there at all.
        self._stored = SnapshotSet(environment.storage, self.spec)
        self._set: SnapshotSet | None = None
        #: Samples each frozen block was run over by this object.
        self.forwards: Counter[str] = Counter()

    @property
    def snapshots(self) -> SnapshotSet:
        """The set, created in the store on first use."""
        if self._set is None:
            self._set = self._environment.snapshots.open(self.spec)
        return self._set

    def reader(self) -> RowReader:
        """Rows of this boundary in any order; what is missing or damaged is computed, stored and served."""
        return RowReader(self.snapshots, compute=self.compute_shard)

    def compute_shard(self, index: int) -> list[np.ndarray]:
        """The shard's arrays, one per field, bf16 as uint16."""
        rows = self.spec.shard_range(index)
        groups = range(rows.start // self.spec.group_rows, -(-rows.stop // self.spec.group_rows))
        columns: list[list[Tensor]] = [[] for _ in self.spec.fields]
        for group in groups:
            for column, tensor in zip(columns, self._compute_group(group), strict=True):
                column.append(tensor)
        return [_to_numpy(torch.cat(column)) for column in columns]

    def _group(self, group: int) -> Boundary:
        """Rows of one group as host tensors of the stored dtype: from the store if it is there."""
        rows = self._group_range(group)
        shard = rows.start // self.spec.shard_rows
        try:
            arrays = self._stored.shard(shard)
        except (MissingShard, CorruptShard):
            return self._compute_group(group)  # released, lost or damaged: its successor needs only these rows
        first = rows.start - shard * self.spec.shard_rows
        return tuple(
            _to_tensor(array[first : first + len(rows)], field)
            for array, field in zip(arrays, self.spec.fields, strict=True)
        )

    def _compute_group(self, group: int) -> Boundary:
        rows = self._group_range(group)
        inputs: Boundary
        if self._previous is None:
            inputs = (self._images.batch(np.arange(rows.start, rows.stop), self._view),)
        else:
            inputs = self._previous._group(group)
        device = self._environment.device
        if self._hop is None:
            blocks = self._boundary.hops[-1]
            self._hop = Path({name: self._weights.build(name) for name in blocks}, trained=())
            if self._boundary.channels_last:
                self._hop.to(memory_format=torch.channels_last)
        for block in self._boundary.hops[-1]:
            self.forwards[block] += len(rows)
        with torch.no_grad(), autocast(self._boundary.precision, device):
            moved = tuple(tensor.to(device) for tensor in inputs)
            outputs = self._hop(as_input(moved, self._boundary.precision))
        dtype = TORCH_DTYPES[self._boundary.dtype]
        return tuple(tensor.to("cpu", dtype).contiguous() for tensor in outputs)

    def _group_range(self, group: int) -> range:
        size = self.spec.group_rows
        return range(group * size, min(self.spec.rows, (group + 1) * size))

    def total_forwards(self) -> Counter[str]:
        """Samples each block was run over, this hop's and (after losses) earlier hops'."""
        earlier = self._previous.total_forwards() if self._previous is not None else Counter()
        return self.forwards + earlier


def boundary_key(
    experiment: Experiment, boundary: BoundarySpec, images: ImageSource, weights: Weights, view: int | None
) -> dict[str, Any]:
    """Everything that determines the bytes of a snapshot set, by content: a changed input is another address."""
    return {
        "kind": "boundary",
        "data": images.identity,
        "view": view_identity(experiment.data, experiment.seed, view),
        "hops": [[{"block": name, "state": weights.digest(name)} for name in hop] for hop in boundary.hops],
        "model": experiment.model.name,
        "precision": boundary.precision,
        "channels_last": boundary.channels_last,
    }


def _fields(experiment: Experiment, boundary: BoundarySpec) -> tuple[Field, ...]:
    chain = models.outline(experiment.model, experiment.data.image_size, experiment.classes)
    outputs = chain.part(boundary.hops[-1][-1]).outputs
    names = ("x",) if len(outputs) == 1 else ("identity", "path")
    return tuple(Field(name, boundary.dtype, shape) for name, shape in zip(names, outputs, strict=True))


def _to_numpy(tensor: Tensor) -> np.ndarray:
    return (tensor.view(torch.uint16) if tensor.dtype is torch.bfloat16 else tensor).numpy()


def _to_tensor(array: np.ndarray, field: Field) -> Tensor:
    # Mapped shards are read-only; the copy is what makes a tensor over them safe to hand to torch.
    tensor = torch.from_numpy(np.array(array))
    return tensor.view(torch.bfloat16) if field.dtype == "bfloat16" else tensor


def snapshot_counters(boundaries: Mapping[Any, StoredBoundary]) -> dict[str, int]:
    """Sum of hits, misses, bytes_read and bytes_written over the sets of a task."""
    total = {"hits": 0, "misses": 0, "bytes_read": 0, "bytes_written": 0}
    for boundary in boundaries.values():
        counters = boundary.snapshots.counters
        for key in total:
            total[key] += getattr(counters, key)
    return total
