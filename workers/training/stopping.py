"""Decide when a stage stops, and which of its epochs is the best: pure functions of its history."""

from __future__ import annotations

from collections.abc import Sequence

from workers.domains.metrics import METRICS
from workers.specs.experiment import TrainSpec
from workers.specs.results import EpochFigures


def _quality(epoch: EpochFigures, monitor: str) -> tuple[float, float]:
    """Higher is better; between equals the loss decides, between equal losses accuracy where it is counted."""
    accuracy, loss = epoch.validation_accuracy, epoch.validation_loss
    if monitor == "loss":
        return -loss, accuracy or 0.0
    value = epoch.validation_of(monitor)
    return (value if METRICS[monitor].higher else -value, -loss)


def is_better(history: Sequence[EpochFigures], best_epoch: int | None, monitor: str = "accuracy") -> bool:
    """Say whether the newest epoch beats the best one so far (ties keep the earlier)."""
    return best_epoch is None or _quality(history[-1], monitor) > _quality(history[best_epoch], monitor)


def exit_reason(
    train: TrainSpec, history: Sequence[EpochFigures], steps: int, total_steps: int, monitor: str = "accuracy"
) -> str | None:
    """Say why the stage ends after its newest epoch (`target`, `plateau`, `steps`, `epochs`), or None to go on."""
    exit_ = train.exit
    values = [_quality(epoch, monitor)[0] for epoch in history]
    if exit_.target is not None and _reached(history[-1], monitor) >= exit_.target:
        return "target"
    if exit_.plateau is not None and _epochs_without_improvement(values, exit_.min_delta) >= exit_.plateau:
        return "plateau"
    if len(history) >= train.epochs:
        return "epochs"
    if steps >= total_steps:
        return "steps"
    return None


def _reached(epoch: EpochFigures, monitor: str) -> float:
    """What a target is compared with: accuracy, of language too, or the score that stands in its place."""
    return epoch.validation_of("accuracy" if monitor == "loss" else monitor)


def _epochs_without_improvement(values: Sequence[float], min_delta: float) -> int:
    best, since = values[0], 0
    for value in values[1:]:
        if value > best + min_delta:
            best, since = value, 0
        else:
            since += 1
    return since
