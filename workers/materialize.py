"""Fill one snapshot set: roll the stored boundary forward by one hop, or make the first one from the raw inputs."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from cache_store.errors import Interrupted
from cache_store.records import Attempt
from workers.boundary import StoredBoundary, snapshot_counters
from workers.domains import domain_of
from workers.environment import WorkerEnvironment
from workers.specs import MaterializeTask
from workers.weights import Weights


def materialize(
    task: MaterializeTask,
    parents: Mapping[str, Mapping[str, Any]],
    environment: WorkerEnvironment,
    attempt: Attempt,
) -> dict[str, Any]:
    """Compute what is missing of the set and commit. Shards already there (an earlier attempt's) are kept."""
    started = time.monotonic()
    domain = domain_of(task.experiment)
    source = domain.source(parents["data"]["result"], environment.snapshots, task.split)
    weights = Weights(environment.nodes, parents, domain, environment.device)
    boundary = StoredBoundary(environment, domain, task.boundary, source, weights, task.view)
    snapshots = boundary.snapshots
    missing = snapshots.missing()
    done = 0
    for index in missing:
        snapshots.put(index, boundary.compute_shard(index))
        done += len(boundary.spec.shard_range(index))
        seconds = time.monotonic() - started
        left = sum(len(boundary.spec.shard_range(i)) for i in missing) - done
        environment.control.progress(
            phase="materialize",
            done=done,
            total=done + left,
            unit=domain.row_unit,
            rate=done / max(seconds, 1e-9),
            seconds_left=left * seconds / max(done, 1),
        )
        if environment.control.should_stop():
            raise Interrupted("materialization stopped; finished shards are kept")
    return attempt.commit(
        {
            "set": boundary.spec.id,
            "rows": source.rows,
            "bytes": snapshots.stored_bytes() if boundary.encoding.name == "lossless" else boundary.spec.bytes,
            "forwards": dict(boundary.total_forwards()),
            "snapshot": snapshot_counters({None: boundary}),
            "seconds": time.monotonic() - started,
            "where": environment.where(),
        }
    )
