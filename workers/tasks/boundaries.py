"""Measure what the boundaries of a network know: one pass over the samples, all boundaries in it, then the estimates.

Samples are drawn from the training split under its first view, which is the one that snapshots are made of first, and
from the validation split under the evaluation transform, for probes. A boundary whose snapshots are in the store is
read, and no block before it runs. What is held at one time are the features (`measures.features`) of all samples at the
boundaries that are measured, and one batch.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from cache_store.errors import DataError, Interrupted
from cache_store.records.nodes import Attempt, Commit
from workers import tensor_files
from workers.control import Control, Update
from workers.data.splits import permutation
from workers.device import autocast
from workers.domains.base import Domain, Source
from workers.domains.registry import domain_of
from workers.environment import WorkerEnvironment
from workers.measures.features import features
from workers.measures.table import Known, Seen, block_size, measure
from workers.models.chain import Boundary
from workers.snapshots.boundary import StoredBoundary, counters_of
from workers.specs.orders import Parents
from workers.specs.results import BoundariesResult, BoundaryMeasures, SnapshotCounters
from workers.specs.tasks import LEAST_MEASURED, BoundariesTask
from workers.weights import Weights, frozen_path, read_tensors

#: The file of a commit that keeps features, by boundary.
FEATURES_FILE = "features.safetensors"
#: What the inputs are called among boundaries.
INPUTS = ""


def measure_boundaries(
    task: BoundariesTask, parents: Parents, environment: WorkerEnvironment, attempt: Attempt
) -> Commit:
    """Measure, and commit the figures. DataError where there are too few samples. Interrupted when the run is being
    stopped: it then begins anew."""
    started = time.monotonic()
    domain = domain_of(task.experiment)
    weights = Weights(environment.nodes, parents, domain, environment.device)
    passes = _Pass(task, domain, weights, environment)
    train = passes.over(domain.source(parents["data"], environment.snapshots, "train"), 0)
    held_out = passes.over(
        domain.source(parents["data"], environment.snapshots, "validation"), None, wanted="probe" in task.measures
    )
    forward_seconds = time.monotonic() - started
    if task.keeps:
        kept = {name: train.features[name] for name in task.boundaries}
        attempt.write(FEATURES_FILE, tensor_files.TensorStream(kept))
    found = _estimates(task, train, held_out, _reference(parents, environment), environment)
    result = BoundariesResult(
        samples=len(train.targets),
        held_out=len(held_out.targets),
        block=block_size(len(train.targets)),
        classes=task.experiment.classes,
        boundaries=found,
        read=passes.read,
        ran=passes.ran,
        snapshot=passes.snapshot,
        forward_seconds=forward_seconds,
        seconds=time.monotonic() - started,
        where=environment.where(),
    )
    return attempt.commit(result.to_json())


@dataclass
class _Gathered:
    """Features (n, d) float32 on the host by boundary, the inputs' among them, and targets int64 (n,)."""

    targets: Tensor
    features: dict[str, Tensor] = field(default_factory=dict)

    def of(self, name: str) -> Tensor:
        """The features at a boundary; of no samples (0, 0)."""
        return self.features.get(name, torch.empty((0, 0)))

    def put(self, name: str, places: np.ndarray, values: Tensor) -> None:
        if name not in self.features:
            self.features[name] = torch.empty((len(self.targets), values.shape[1]))
        self.features[name][torch.from_numpy(places)] = values.cpu()


class _Pass:
    """Runs the frozen network over the samples of a split, batch by batch."""

    def __init__(self, task: BoundariesTask, domain: Domain, weights: Weights, environment: WorkerEnvironment) -> None:
        self._task, self._domain, self._weights, self._environment = task, domain, weights, environment
        before = () if task.stored is None else tuple(block for hop in task.stored.hops for block in hop)
        #: The boundary that the pass begins at, where it is one that is measured.
        self._first = before[-1] if before and before[-1] in task.boundaries else None
        self._blocks = {
            name: frozen_path(
                weights,
                (name,),
                environment.device,
                tier=task.frozen or "device",
                channels_last=task.channels_last,
            )
            for name in task.path[len(before) :]
        }
        self.read = self.ran = 0
        self.snapshot = SnapshotCounters()

    def over(self, source: Source, view: int | None, *, wanted: bool = True) -> _Gathered:
        """Gather features of samples of a split, in an order drawn by the seed; of none where none are `wanted`."""
        most = self._task.samples if wanted else 0
        drawn = permutation(source.rows, self._task.experiment.seed, "boundaries")[:most]
        places = np.argsort(drawn, kind="stable")
        gathered = _Gathered(self._domain.rows(source, drawn).targets)
        stored = self._stored(source, view)
        for start in range(0, len(drawn), self._task.batch_size):
            _keep_going(self._environment.control, start, len(drawn), self._domain.unit)
            batch = places[start : start + self._task.batch_size]
            for name, boundary in self._boundaries(source, view, drawn[batch], stored):
                gathered.put(name, batch, features(boundary))
        if stored is not None:
            self.snapshot += counters_of(stored.found)
        return gathered

    def _stored(self, source: Source, view: int | None) -> StoredBoundary | None:
        task = self._task
        if task.stored is None:
            return None
        return StoredBoundary(
            self._environment, self._domain, task.stored, source, self._weights, view, task.frozen or "device"
        )

    @torch.no_grad()
    def _boundaries(
        self, source: Source, view: int | None, index: np.ndarray, stored: StoredBoundary | None
    ) -> Iterator[tuple[str, Boundary]]:
        """Yield the inputs of some samples and their boundaries that are measured, by name."""
        rows = self._domain.rows(source, index)
        raw = self._domain.load(source, rows, view)
        yield INPUTS, raw
        entering, read = (raw, False) if stored is None else stored.activations(index)
        self.read, self.ran = self.read + read * len(index), self.ran + (not read) * len(index)
        if self._first is not None:
            yield self._first, entering
        task, device = self._task, self._environment.device
        batch = self._domain.batch(
            rows,
            entering,
            stored=stored is not None,
            device=device,
            precision=task.precision,
            channels_last=task.channels_last,
        )
        here = batch.boundary
        with autocast(task.precision, device):
            for name, block in self._blocks.items():
                here = block(here, batch.context)
                if name in task.boundaries:
                    yield name, here


def _keep_going(control: Control, done: int, total: int, unit: str) -> None:
    control.progress(Update(phase="boundaries", done=done, total=total, unit=unit))
    if control.should_stop():
        raise Interrupted("measuring boundaries was stopped; it begins anew with the next run")


def _reference(parents: Parents, environment: WorkerEnvironment) -> Mapping[str, Tensor]:
    """Read the features of the network that this one is compared with; {} where there is none."""
    commit = parents.get("reference")
    return {} if commit is None else read_tensors(environment.nodes, commit.files[FEATURES_FILE])


def _estimates(
    task: BoundariesTask,
    train: _Gathered,
    held_out: _Gathered,
    reference: Mapping[str, Tensor],
    environment: WorkerEnvironment,
) -> dict[str, BoundaryMeasures]:
    device, control = environment.device, environment.control
    if len(train.targets) < LEAST_MEASURED:
        raise DataError(
            f"evaluation.boundaries: {len(train.targets)} training samples are too few to measure with; at least "
            f"{LEAST_MEASURED}"
        )
    known = Known.of(
        train.features[INPUTS].to(device),
        train.targets.to(device),
        held_out.targets.to(device),
        task.experiment.classes,
        task.bandwidth or "fixed",
    )
    found: dict[str, BoundaryMeasures] = {}
    for number, name in enumerate(task.boundaries):
        _keep_going(control, number, len(task.boundaries), "boundaries")
        beside = reference.get(name)
        seen = Seen(
            train.features[name].to(device),
            held_out.of(name).to(device),
            None if beside is None else beside.to(device),
        )
        found[name] = BoundaryMeasures(width=seen.samples.shape[1], measures=measure(seen, known, task.measures))
    return found
