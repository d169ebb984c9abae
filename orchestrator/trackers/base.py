"""Define what a tracker is, and which figures of a run it receives.

A tracker is told of every regime in turn, each an experiment of its own, and of its points in order of the epochs,
which count from 1 over all stages. It is filled from the summary when a run ends or is reported again, so the same
summary gives it the same points: a tracker replaces what it had.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from orchestrator.reports.records import Metrics, RegimeSummary, StageSummary

#: Field of an epoch -> name of the figure.
EPOCH_FIGURES = {
    "train_loss": "train/loss",
    "validation_loss": "validation/loss",
    "train_accuracy": "train/accuracy",
    "validation_accuracy": "validation/accuracy",
    "lr": "train/learning_rate",
    "images_per_s": "train/images_per_second",
    "samples_per_s": "train/samples_per_second",
    "peak_device_bytes": "memory/peak_device_bytes",
    "peak_device_reserved_bytes": "memory/peak_device_reserved_bytes",
    "peak_host_bytes": "memory/peak_host_bytes",
}
#: Metrics that a network may be judged by.
SCORES = ("accuracy", "loss", "f1_micro", "r2")
#: Metric of an epoch's own validation -> name of the figure.
VALIDATION_FIGURES = {
    name: f"validation/{name}" for name in ("perplexity", "token_accuracy", "f1_micro", "f1_macro", "r2", "rmse", "mae")
}
#: Metrics of the test split after an epoch -> names of the figures.
TEST_FIGURES = {split: {name: f"{split}/{name}" for name in SCORES} for split in ("test", "test_auxiliary")}
#: Metric of the assembled network after a stage -> name of the figure.
ASSEMBLED_FIGURES = {name: f"assembled/{name}" for name in (*SCORES, "perplexity")}


@dataclass(frozen=True)
class LoggedPoint:
    """Figures by name, after `step` epochs of the regime. `when`: unix seconds."""

    step: int
    when: float
    figures: Mapping[str, float]


class Tracker(Protocol):
    """Receives the points of a run. Called from one thread."""

    def start(self, regime: str, when: float) -> None:
        """Begin a regime, which began at `when` (unix seconds); the points that follow are its own."""

    def log(self, point: LoggedPoint) -> None:
        """Take one point of the regime that was started last."""


#: Makes the tracker of a run, given the run directory. Leaving the context keeps what was logged; leaving it by an
#: exception keeps what was there before.
OpenTracker = Callable[[Path], AbstractContextManager[Tracker]]


def points_of(regime: RegimeSummary) -> Iterator[LoggedPoint]:
    """Yield a point an epoch, and one for the assembled network after each stage."""
    step = 0
    for stage in regime.stages:
        when = began(stage)
        for epoch in stage.curve:
            step += 1
            when += float(epoch.seconds or 0.0)
            figures = {name: epoch.figure(key) for key, name in EPOCH_FIGURES.items()}
            validation = epoch.validation or {}
            figures |= {name: validation.get(key) for key, name in VALIDATION_FIGURES.items()}
            for path, names in TEST_FIGURES.items():
                tested: Metrics = getattr(epoch, path) or {}
                figures |= {name: tested.get(key) for key, name in names.items()}
            yield LoggedPoint(step, when, _known(figures))
        whole = _known({name: stage.assembled.get(key) for key, name in ASSEMBLED_FIGURES.items()}) | judged(stage)
        if whole and stage.curve:
            yield LoggedPoint(step, when, whole)


def judged(stage: StageSummary) -> dict[str, float]:
    """Return what the whole network after a stage has on benchmarks, as figures by name."""
    return {f"judged/{name}": score.value for name, score in (stage.judged or {}).items()}


def began(stage: StageSummary) -> float:
    """Return when a stage began, in unix seconds; 0 where that is not known."""
    return float((stage.where and stage.where.started) or 0.0)


def _known(figures: Mapping[str, float | None]) -> dict[str, float]:
    return {name: float(value) for name, value in figures.items() if value is not None}
