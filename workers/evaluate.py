"""Score an assembled chain from the images: the ordinary forward pass of the ordinary model."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from cache_store.records import Attempt
from workers.batches import ImageInputs, batches
from workers.chain import Path
from workers.data.images import ImageSource
from workers.environment import WorkerEnvironment
from workers.scoring import score
from workers.specs import EvaluateTask
from workers.weights import Weights


def evaluate(
    task: EvaluateTask,
    parents: Mapping[str, Mapping[str, Any]],
    environment: WorkerEnvironment,
    attempt: Attempt,
) -> dict[str, Any]:
    """Mean cross-entropy and accuracy (0..1) over the split."""
    started = time.monotonic()
    device = environment.device
    images = ImageSource(task.experiment, parents["data"]["result"], environment.snapshots, task.split)
    weights = Weights(environment.nodes, parents, task.experiment, device)
    path = Path({name: weights.build(name) for name in task.path}, trained=())
    if task.channels_last:
        path.to(memory_format=torch.channels_last)
    loaded = batches(
        ImageInputs(images, environment.device),
        images.labels,
        np.arange(images.rows),
        batch_size=task.batch_size,
        view=None,
        steps=range(-(-images.rows // task.batch_size)),
        device=device,
        channels_last=task.channels_last,
    )
    loss, accuracy, rows = score(path, loaded, task.precision, device)
    return attempt.commit(
        {
            "metrics": {"loss": loss, "accuracy": accuracy},
            "rows": rows,
            "seconds": time.monotonic() - started,
            "where": environment.where(),
        }
    )
