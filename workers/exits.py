"""When a stage stops, and which of its epochs is the best: pure functions of its history."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from workers.specs import TrainSpec

Epoch = dict[str, Any]


def _quality(epoch: Epoch) -> tuple[float, float]:
    """Higher is better: validation accuracy, then (for equal accuracy) lower validation loss."""
    return epoch["validation_accuracy"], -epoch["validation_loss"]


def is_better(history: Sequence[Epoch], best_epoch: int | None) -> bool:
    """Whether the newest epoch beats the best one so far (ties keep the earlier)."""
    return best_epoch is None or _quality(history[-1]) > _quality(history[best_epoch])


def exit_reason(train: TrainSpec, history: Sequence[Epoch], steps: int, total_steps: int) -> str | None:
    """Why the stage ends after its newest epoch (`target`, `plateau`, `steps`, `epochs`), or None to go on."""
    exit_ = train.exit
    accuracies = [epoch["validation_accuracy"] for epoch in history]
    if exit_.target is not None and accuracies[-1] >= exit_.target:
        return "target"
    if exit_.plateau is not None and _epochs_without_improvement(accuracies, exit_.min_delta) >= exit_.plateau:
        return "plateau"
    if len(history) >= train.epochs:
        return "epochs"
    if steps >= total_steps:
        return "steps"
    return None


def _epochs_without_improvement(accuracies: Sequence[float], min_delta: float) -> int:
    best, since = accuracies[0], 0
    for accuracy in accuracies[1:]:
        if accuracy > best + min_delta:
            best, since = accuracy, 0
        else:
            since += 1
    return since
