"""Where a stage is, as the manifest of a checkpoint has it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from cache_store.records.nodes import NodeStore
from cache_store.storage.open import open_storage
from workers.specs.results import EpochFigures
from workers.tensor_files import TensorStream
from workers.training.checkpoint import FILE, StageProgress, load

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


def without(key: str) -> dict[str, Any]:
    return {name: value for name, value in POSITION.items() if name != key}


@pytest.mark.parametrize(
    "progress",
    [
        *(without(key) for key in ("epoch", "step", "global_step")),
        {**POSITION, "epoch": None},
        {**POSITION, "epoch": "1"},
        {**POSITION, "epoch": 2},
        {**POSITION, "epoch": -1},
        {**POSITION, "history": None},
        {**POSITION, "sums": []},
        [],
        None,
    ],
    ids=str,
)
def test_a_checkpoint_that_does_not_say_where_it_is_is_passed_over(tmp_path: Path, progress: Any) -> None:
    """Its tensors would go on at the first epoch, trained once already."""
    nodes = NodeStore(open_storage(str(tmp_path)))
    files = {FILE: TensorStream({"model/w": torch.ones(2)})}
    good, node = [5, 1, 2], "0" * 32
    nodes.save_checkpoint(node, "a", files=files, position=good, data={"progress": POSITION, "scaler": {}})
    for data in ({"progress": progress, "scaler": {}}, {"scaler": {}}):
        nodes.save_checkpoint(node, "b", files=files, position=[9, 1, 2], data=data)
        nodes.save_checkpoint(node, "c", files=files, position=good, data=data)
    found = load(nodes, node)
    assert found is not None
    assert (found.progress.epoch, found.progress.global_step, found.progress.resumed) == (1, 5, 2)


def test_a_position_is_read_as_it_was_written_and_written_key_for_key() -> None:
    progress = StageProgress.from_json(POSITION)
    assert isinstance(progress.history[0], EpochFigures)
    assert (progress.global_step, progress.history[0].rate) == (5, 12.0)
    assert json.dumps(progress.to_json()) == json.dumps(POSITION)
