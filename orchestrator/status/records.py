"""Read how far a stage is from what workers leave in a store."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from orchestrator.reports.commit_view import CommitFigures
from orchestrator.reports.record_json import finite, from_json
from orchestrator.reports.records import EpochSummary


@dataclass(frozen=True)
class StageProgress:
    """How far a stage is, by its commit or its newest checkpoint. `resumed`: how often it went on from a checkpoint."""

    epochs: tuple[EpochSummary, ...] = ()
    resumed: int = 0

    @classmethod
    def of_checkpoint(cls, progress: Any) -> StageProgress | None:
        """Read the progress of a stage's checkpoint; None where the checkpoint has none that can be read."""
        if not isinstance(progress, dict) or not progress:
            return None
        epochs = tuple(from_json(EpochSummary, finite(epoch), "an epoch") for epoch in progress.get("history") or ())
        return cls(epochs, int(progress.get("resumed") or 0))

    @classmethod
    def of_commit(cls, figures: CommitFigures) -> StageProgress:
        """Take the progress of a stage that is committed."""
        return cls(figures.epochs, figures.resumed or 0)

    @property
    def latest(self) -> EpochSummary:
        return self.epochs[-1] if self.epochs else EpochSummary()
