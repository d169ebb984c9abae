"""List the trackers that every run fills: a tracker is one row."""

from __future__ import annotations

from pathlib import Path

from cache_store.storage.durable import typed_errors
from orchestrator.reports.records import Summary
from orchestrator.trackers.base import OpenTracker, began, points_of
from orchestrator.trackers.tensorboard import tensorboard

TRACKERS: dict[str, OpenTracker] = {
    "tensorboard": tensorboard,
}


def track(run_dir: Path, summary: Summary) -> None:
    """Fill every tracker with the regimes that have epochs. StoreError where the run directory cannot be written."""
    shown = {name: regime for name, regime in summary.regimes.items() if any(stage.curve for stage in regime.stages)}
    for open_tracker in TRACKERS.values():
        with typed_errors("write", run_dir), open_tracker(run_dir) as tracker:
            for name, regime in shown.items():
                tracker.start(name, began(regime.stages[0]))
                for point in points_of(regime):
                    tracker.log(point)
