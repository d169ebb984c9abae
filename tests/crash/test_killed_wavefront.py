"""Overlapping stages on real Ray, two at a time, killed again and again: the bits of one process that was not."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from running import Lab, RayHome, final_digests, summary_of, write_config

from orchestrator.prepare import prepare

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

#: Where a process kills itself, and at which of its own visits.
DRIVER_KILLS = ("driver.committed:9", "driver.after-release:1")
WORKER_KILLS = ("checkpoint.committed:2", "stage.step:14", "node.committed:5")


@pytest.mark.timeout(900)
def test_a_wave_of_two_slots_killed_at_five_moments_ends_as_one_of_one_slot(tmp_path: Path, ray_home: RayHome) -> None:
    reference = Lab.make(tmp_path / "reference", CHANGES)
    reference.run_all(("data", "model", "train", "materialize", "average"))
    expected = final_digests(reference.prepared)

    resources = {"runner": "ray", "device": "cpu", "slots": 2, "threads": 1, "max_attempts": 10}
    config = write_config(tmp_path, {**CHANGES, "resources": resources})
    kills = {point: tmp_path / f"killed-{point.replace(':', '-')}" for point in (*DRIVER_KILLS, *WORKER_KILLS)}
    armed = ",".join(f"{point}:{marker}" for point, marker in kills.items())
    output = tmp_path / "output.txt"
    codes: list[int] = []
    while not codes or codes[-1] != 0:
        assert len(codes) <= len(DRIVER_KILLS), output.read_text()[-4000:]
        driver = ray_home.start(str(config), "--quiet", output=output, SEGPROP_CRASH=armed)
        codes.append(driver.wait(timeout=300))
        assert codes[-1] in (0, -signal.SIGKILL), output.read_text()[-4000:]
        ray_home.wait_gone(killed=codes[-1] != 0)

    assert [point for point, marker in kills.items() if not marker.exists()] == []
    assert codes == [-signal.SIGKILL] * len(DRIVER_KILLS) + [0]
    assert final_digests(prepare(config)) == expected
    assert summary_of(tmp_path / "run")["status"] == "done"
