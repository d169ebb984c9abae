"""Overlapping stages on real Ray, two at a time, killed again and again: the bits of one process that was not."""

from __future__ import annotations

from pathlib import Path

import pytest
from running import Lab, RayHome, final_digests, summary_of, write_config

from orchestrator.runs.prepare import prepare

CHANGES = {
    "data.train_limit": 48,
    "data.views": 2,
    "split.base": 2,
    "training.epochs": 4,
    "training.checkpoint_every_s": 0.001,  # at the end of every epoch
    "model.dropout": 0.5,
    "pipeline": "wavefront",
    "wavefront": {"rounds": 2},
    "evaluation.stages": False,
}

#: Where a process kills itself, and at which of its own visits. Two workers share the nodes as it happens, and a killed
#: driver takes both of them along, so every number is one that some process must reach whoever gets what: nine worker
#: processes at most (two for each of three drivers, and one for each of them that was killed) make more than nine
#: commits, so one makes two; a round of a stage has six steps and a checkpoint.
DRIVER_KILLS = ("driver.committed:9", "driver.after-release:1")
WORKER_KILLS = ("stage.step:5", "checkpoint.committed:1", "node.committed:2")


@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_wave_of_two_slots_killed_at_five_moments_ends_as_one_of_one_slot(tmp_path: Path, ray_home: RayHome) -> None:
    reference = Lab.make(tmp_path / "reference", CHANGES)
    reference.run_all(("data", "model", "train", "materialize", "average"))
    expected = final_digests(reference.prepared)

    resources = {"runner": "ray", "device": "cpu", "slots": 2, "threads": 1, "max_attempts": 10}
    config = write_config(tmp_path, {**CHANGES, "resources": resources})
    ray_home.run_through_kills(config, driver=DRIVER_KILLS, workers=WORKER_KILLS)
    assert final_digests(prepare(config)) == expected
    assert summary_of(tmp_path / "run")["status"] == "done"
