"""Where a stage is, as the manifest of a checkpoint has it."""

from __future__ import annotations

import json

from workers.specs.results import EpochFigures
from workers.training.checkpoint import StageProgress

EPOCH = {
    "epoch": 0,
    "train_loss": 2.0,
    "train_accuracy": None,
    "validation_loss": 1.5,
    "validation_accuracy": 0.25,
    "validation": {"loss": 1.5, "accuracy": 0.25},
    "lr": 0.1,
    "seconds": 3.0,
    "validation_seconds": 0.5,
    "samples_per_s": 12.0,
    "peak_device_bytes": None,
    "peak_device_reserved_bytes": None,
    "peak_host_bytes": 1000,
}
#: As checkpoints had it when epochs were plain JSON.
POSITION = {
    "epoch": 1,
    "step": 2,
    "global_step": 5,
    "sums": [1.0, 2.0, 3.0],
    "epoch_seconds": 0.5,
    "history": [EPOCH],
    "best_epoch": 0,
    "exit": None,
    "resumed": 1,
}


def test_a_position_is_read_as_it_was_written_and_written_key_for_key() -> None:
    progress = StageProgress.from_json(POSITION)
    assert isinstance(progress.history[0], EpochFigures)
    assert (progress.global_step, progress.history[0].rate) == (5, 12.0)
    assert json.dumps(progress.to_json()) == json.dumps(POSITION)
