"""Fill one snapshot set: roll the stored boundary forward by one hop, or make the first one from the raw inputs."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator

from cache_store.errors import Interrupted
from cache_store.records.nodes import Attempt, Commit
from workers.control import Update
from workers.domains.registry import domain_of
from workers.environment import WorkerEnvironment
from workers.snapshots.boundary import StoredBoundary, snapshot_counters
from workers.snapshots.production import Made, MadeFigures, SharedSet, whole_set
from workers.specs.orders import FirstAsked, Parents, Production
from workers.specs.results import MaterializeResult
from workers.specs.tasks import MaterializeTask
from workers.tasks.gate import reached
from workers.training.shuffle import order_seed, shard_order
from workers.weights import Weights


def materialize(
    task: MaterializeTask,
    parents: Parents,
    environment: WorkerEnvironment,
    attempt: Attempt,
    production: Production,
) -> Commit | None:
    """Compute what is missing of the set and commit; nothing if the run's exit leaves its reader out. Shards already
    there (an earlier attempt's) are kept.

    A helper makes shards as long as there are free ones and returns None, without a commit.
    """
    started = time.monotonic()
    domain = domain_of(task.experiment)
    source = domain.source(parents["data"], environment.snapshots, task.split)
    weights = Weights(environment.nodes, parents, domain, environment.device)
    boundary = StoredBoundary(environment, domain, task.boundary, source, weights, task.view, task.frozen or "device")
    if reached(task.gate, parents):
        # Of what nobody will read there is an empty set: for the driver, one that is not there was released.
        boundary.snapshots.ensure()
        if production.helper:
            return None
        nothing = MaterializeResult(
            set=boundary.spec.id, rows=0, bytes=0, seconds=time.monotonic() - started, where=environment.where()
        )
        return attempt.commit(nothing.to_json())
    watch = _Watch(boundary, environment, domain.row_unit)
    work = _Work(boundary, task.experiment.seed, production.first_asked)
    if not production.shared:
        watch.over(work.alone())
        seconds = time.monotonic() - started
        figures = MadeFigures(dict(boundary.total_forwards()), snapshot_counters([boundary]), seconds)
    else:
        made = Made(attempt)
        made.watch(boundary)
        shared = SharedSet(boundary, environment.control, made)
        if production.helper:
            watch.over(work.helping(shared))
            return None
        watch.over(work.finishing(shared))
        shared.settle()
        made.seconds = time.monotonic() - started - shared.waited
        figures = made.total(environment.nodes)
    return attempt.commit(whole_set(boundary, figures, environment.where()).to_json())


class _Work:
    """Fill a set, in one of three ways; each yields the shards it has made."""

    def __init__(self, boundary: StoredBoundary, seed: int, first: FirstAsked | None) -> None:
        self._boundary = boundary
        shards = boundary.spec.shards
        if first is None:
            order = list(range(shards))
        else:
            order = shard_order(order_seed(seed, first.stage), first.epoch, shards).tolist()
        self._place = {index: place for place, index in enumerate(order)}

    def missing(self) -> list[int]:
        """List the shards that are missing, in the order in which they will be asked for."""
        return sorted(self._boundary.snapshots.missing(), key=self._place.__getitem__)

    def alone(self) -> Iterator[int]:
        for index in self.missing():
            self._boundary.snapshots.put(index, self._boundary.compute_shard(index))
            yield index

    def helping(self, shared: SharedSet) -> Iterator[int]:
        """Make shards until a look over the whole set finds nothing to take."""
        found = True
        while found:
            found = False
            for index in shared.make(self.missing()):
                found = True
                yield index

    def finishing(self, shared: SharedSet) -> Iterator[int]:
        """Make shards until nothing is missing: what others have in hand is waited for, and made here when they let it
        go."""
        while True:
            yield from self.helping(shared)
            if not self._boundary.snapshots.missing():
                return
            shared.pause()


class _Watch:
    """Report the work on a set, and stop it when asked to."""

    def __init__(self, boundary: StoredBoundary, environment: WorkerEnvironment, unit: str) -> None:
        self._boundary = boundary
        self._control = environment.control
        self._unit = unit

    def over(self, work: Iterable[int]) -> None:
        """Carry out `work`, which yields every shard it has made. Raises Interrupted when asked to stop."""
        spec = self._boundary.spec
        total = sum(len(spec.shard_range(index)) for index in self._boundary.snapshots.missing())
        started, done = time.monotonic(), 0
        for index in work:
            done += len(spec.shard_range(index))
            seconds = time.monotonic() - started
            update = Update(
                phase="materialize",
                done=done,
                total=total,
                unit=self._unit,
                rate=done / max(seconds, 1e-9),
                seconds_left=(total - done) * seconds / max(done, 1),
            )
            self._control.progress(update)
            if self._control.should_stop():
                raise Interrupted("materialization stopped; finished shards are kept")
