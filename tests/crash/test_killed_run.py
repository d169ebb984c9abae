"""A small run on real Ray, killed again and again."""

from __future__ import annotations

from pathlib import Path

import pytest
from running import Lab, RayHome, final_digests, summary_of, tree, write_config

from orchestrator.runs.prepare import prepare

CHANGES = {
    "training.epochs": 3,
    "training.checkpoint_every_s": 0.001,  # at the end of every epoch
    "training.precision": "bf16",
    "training.channels_last": True,
    "data.views": 2,
}

#: Where a process kills itself, and at which of its own visits.
DRIVER_KILLS = (
    "driver.submitted:1",
    "driver.committed:4",
    "driver.before-release:1",
    "driver.after-release:2",
    "driver.exported:1",
)
WORKER_KILLS = (
    "shard.written:2",
    "stage.step:9",
    "checkpoint.committed:1",
    "node.written:2",
    "node.committed:3",
)


@pytest.mark.timeout(900)
def test_driver_and_workers_killed_at_ten_moments_lose_nothing(tmp_path: Path, ray_home: RayHome) -> None:
    reference = Lab.make(tmp_path / "reference", CHANGES)
    reference.run_all(("data", "model", "train", "materialize"))
    expected = final_digests(reference.prepared)

    config = write_config(
        tmp_path,
        {**CHANGES, "resources": {"runner": "ray", "device": "cpu", "slots": 2, "threads": 1, "max_attempts": 10}},
    )
    ray_home.run_through_kills(config, driver=DRIVER_KILLS, workers=WORKER_KILLS)
    prepared = prepare(config)
    assert final_digests(prepared) == expected
    summary = summary_of(tmp_path / "run")
    assert summary["status"] == "done"
    assert summary["regimes"]["segprop"]["export"] == "model/segprop"
    # What a killed release left half deleted, and what killed attempts wrote, is not in anybody's way.
    assert not [path for path in tree(tmp_path / "run" / "store") if "/quarantine/" in path]
