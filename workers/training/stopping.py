"""Decide when a stage stops, and which of its epochs is the best: pure functions of its history."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from workers.specs.experiment import TrainSpec
from workers.specs.results import EpochFigures

#: The validation metric that chooses epochs: classifiers are judged by accuracy, language models by loss.
Monitor = Literal["accuracy", "loss"]


def _quality(epoch: EpochFigures, monitor: Monitor) -> tuple[float, float]:
    """Higher is better; the other metric decides between equals."""
    accuracy, loss = epoch.validation_accuracy, epoch.validation_loss
    return (accuracy, -loss) if monitor == "accuracy" else (-loss, accuracy)


def is_better(history: Sequence[EpochFigures], best_epoch: int | None, monitor: Monitor = "accuracy") -> bool:
    """Say whether the newest epoch beats the best one so far (ties keep the earlier)."""
    return best_epoch is None or _quality(history[-1], monitor) > _quality(history[best_epoch], monitor)


def exit_reason(
    train: TrainSpec, history: Sequence[EpochFigures], steps: int, total_steps: int, monitor: Monitor = "accuracy"
) -> str | None:
    """Say why the stage ends after its newest epoch (`target`, `plateau`, `steps`, `epochs`), or None to go on."""
    exit_ = train.exit
    values = [_quality(epoch, monitor)[0] for epoch in history]
    if exit_.target is not None and history[-1].validation_accuracy >= exit_.target:
        return "target"
    if exit_.plateau is not None and _epochs_without_improvement(values, exit_.min_delta) >= exit_.plateau:
        return "plateau"
    if len(history) >= train.epochs:
        return "epochs"
    if steps >= total_steps:
        return "steps"
    return None


def _epochs_without_improvement(values: Sequence[float], min_delta: float) -> int:
    best, since = values[0], 0
    for value in values[1:]:
        if value > best + min_delta:
            best, since = value, 0
        else:
            since += 1
    return since
