"""Feed a stage: both splits, raw, stored or computed again, and the sets that are made along."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np

from cache_store.snapshots.reader import RowReader
from workers.device import autocast
from workers.distributed.gang import add_counts
from workers.domains.base import Batch, Domain, Source
from workers.environment import WorkerEnvironment
from workers.models.chain import Boundary, ModulePath, module_bytes
from workers.snapshots.boundary import StoredBoundary, geometry_of, snapshot_counters
from workers.snapshots.production import Made, SharedSet
from workers.specs.orders import Parents, Production
from workers.specs.results import SnapshotCounters
from workers.specs.tasks import StageTask, snapshot_role
from workers.training.batches import Inputs, RawInputs, StoredInputs, samples_of_steps, steps_per_epoch
from workers.training.shuffle import epoch_order, order_seed, windowed_order
from workers.weights import Weights, frozen_path

SPLITS = ("train", "validation")


class StageInputs:
    """Hold the inputs of one stage by split, and say how many steps they make."""

    def __init__(
        self,
        task: StageTask,
        parents: Parents,
        environment: WorkerEnvironment,
        domain: Domain,
        weights: Weights,
        *,
        made: Made,
        production: Production,
    ) -> None:
        """`made` counts what is made of the sets that nobody has finished yet (`production.unfinished`)."""
        self._task, self._environment, self._domain, self._weights = task, environment, domain, weights
        self._made, self._production = made, production
        #: Samples of the train split that are trained on; None: all.
        self._first: int | None = None
        train = task.train
        self.sources: dict[str, Source] = {
            split: domain.source(parents["data"], environment.snapshots, split) for split in SPLITS
        }
        self.views = domain.views(self.sources["train"])
        self.per_epoch = steps_per_epoch(self.sources["train"].rows, train.batch_size, train.drop_last)
        self.total_steps = train.epochs * self.per_epoch
        if train.exit.steps is not None:
            self.total_steps = min(self.total_steps, train.exit.steps)
        #: Where this piece of work ends: a round before the stage does.
        self.last_step = min(self.total_steps, task.epochs.stop * self.per_epoch)
        self.boundaries: dict[tuple[str, int | None], StoredBoundary] = {}
        self._shared: list[SharedSet] = []
        #: The frozen blocks before the stage, where it computes its inputs again.
        self.prefix: ModulePath | None = None
        if task.source == "recompute":
            blocks = [name for hop in task.stored_boundary.hops for name in hop]
            self.prefix = frozen_path(weights, blocks, environment.device, tier=task.tiers.frozen_tier)
        self.by_split = {split: self._inputs(split) for split in SPLITS}

    def _inputs(self, split: str) -> Inputs:
        train, source, device = self._task.train, self.sources[split], self._environment.device
        if self._task.source == "snapshots":
            return self._stored(split)
        return RawInputs(
            self._domain,
            source,
            device,
            train.precision,
            channels_last=train.channels_last,
            prefix=None if self.prefix is None else self.through(self.prefix),
        )

    def _stored(self, split: str) -> Inputs:
        task, source = self._task, self.sources[split]
        # Of a view that is never reached not even an empty set is made.
        epochs = range(task.epochs.start, -(-self.last_step // self.per_epoch))
        views = sorted({epoch % self.views for epoch in epochs}) if split == "train" else [None]
        readers = {}
        for view in views:
            boundary = StoredBoundary(
                self._environment,
                self._domain,
                task.stored_boundary,
                source,
                self._weights,
                view,
                task.tiers.frozen_tier,
            )
            self.boundaries[split, view] = boundary
            readers[view] = self._reader(snapshot_role(split, view), boundary)
        return StoredInputs(
            self._domain,
            source,
            readers,
            boundary.geometry,
            self._environment.device,
            task.train.precision,
            channels_last=task.train.channels_last,
            decode=boundary.encoding.decode,
        )

    def _reader(self, role: str, boundary: StoredBoundary) -> RowReader:
        if role not in self._production.unfinished:
            return boundary.reader()
        self._made.watch(boundary)
        shared = SharedSet(boundary, self._environment.control, self._made, alone=not self._production.shared)
        self._shared.append(shared)
        return boundary.reader(shared.obtain)

    def through(self, prefix: ModulePath) -> Callable[[Batch], Batch]:
        """Make the frozen blocks a step of loading: their output takes the place of the batch's boundary."""
        precision = self._task.train.precision

        def forward(batch: Batch) -> Batch:
            with autocast(precision, self._environment.device):
                outputs: Boundary = prefix(batch.boundary, batch.context)
            return dataclasses.replace(batch, boundary=self._domain.as_input(outputs, precision))

        return forward

    # -- during training ------------------------------------------------------------------------------------

    def only_first(self, samples: int) -> None:
        """Train on the first so many samples alone, at least a batch of them. For looking at some steps."""
        self._first = max(samples, min(self._task.train.batch_size, self.sources["train"].rows))
        self.per_epoch = steps_per_epoch(self._first, self._task.train.batch_size, self._task.train.drop_last)

    def order(self, epoch: int) -> np.ndarray:
        """Give the samples of the train split in the order of an epoch: int64."""
        order = self._order(epoch)
        return order if self._first is None else order[order < self._first]

    def _order(self, epoch: int) -> np.ndarray:
        seed, source = order_seed(self._task.experiment.seed, self._task.ordered_by), self.sources["train"]
        if self._task.window is None:
            return epoch_order(seed, epoch, source.rows)
        sizes = geometry_of(self._domain, self._task.stored_boundary, source).shard_samples
        return windowed_order(seed, epoch, sizes, self._task.window)

    def samples(self, steps: int) -> int:
        """Count the training samples that so many steps take, from the beginning of an epoch."""
        train = self._task.train
        return samples_of_steps(steps, self.sources["train"].rows, train.batch_size, train.drop_last)

    def let_go(self) -> None:
        """Drop what made missing snapshots: the steps do not need it, and every view has its own."""
        for boundary in self.boundaries.values():
            boundary.let_go()

    def counters(self) -> SnapshotCounters:
        """Count what this rank has found, read and written of the sets so far."""
        return snapshot_counters(self.boundaries.values())

    # -- afterwards -----------------------------------------------------------------------------------------

    @property
    def by_role(self) -> Mapping[str, StoredBoundary]:
        """Give the sets that are read, by the role of their nodes."""
        return {snapshot_role(*key): boundary for key, boundary in self.boundaries.items()}

    def seconds(self) -> float | None:
        """Sum up what this attempt spent on loading, and on the frozen blocks where they are computed again. Waits for
        the device. None: not known."""
        spent = [inputs.seconds for inputs in self.by_split.values()]
        known = [seconds for seconds in spent if seconds is not None]
        return sum(known) if len(known) == len(spent) else None

    def waited_s(self) -> float | None:
        """Sum up the seconds spent waiting for others who make the same sets; None where nobody can be."""
        return sum(shared.waited for shared in self._shared) if self._shared else None

    def prefix_bytes(self) -> int:
        """Count the bytes of the frozen blocks before the stage that stay in memory."""
        return 0 if self.prefix is None else module_bytes(self.prefix)

    def forwards(self, steps: int, epochs: int) -> Mapping[str, int]:
        """Count the samples run through each frozen block in so many steps and epochs. Every rank of a gang must
        ask."""
        if self.prefix is not None:
            samples = self.samples(steps) + epochs * self.sources["validation"].rows
            return dict.fromkeys(self.prefix.parts, samples)
        if self._shared:  # never in a gang
            return self._made.total(self._environment.nodes).forwards
        own = [dict(boundary.total_forwards()) for boundary in self.boundaries.values()]
        return add_counts([count for counts in self._environment.gang.gather(own) for count in counts])
