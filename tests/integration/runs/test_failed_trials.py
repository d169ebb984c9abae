"""Trials that fail under Ray Tune: over for the scheduler, and no word of Ray's own."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from running import RayHome

#: The first trial fails before it has a figure, the second behind one, the third goes to its end.
CODE = """
import time
from orchestrator.config.sweep_schema import SchedulerConfig
from orchestrator.runners import ray_cluster
from orchestrator.sweeps.metric import Metric
from orchestrator.sweeps.ray_tune import TuneDecider
from orchestrator.sweeps.steering import Begun, Ended, WentOn

started = ray_cluster.connect(None, 1)
metric = Metric("segprop", "validation", "loss", "min")
points = {f"t{n}": {"training.epochs": n} for n in range(3)}
decider = TuneDecider(points, {}, metric, SchedulerConfig(name="asha", grace=2), stages=2, concurrency=3, seed=0)
decider.start()
over, deadline = [], time.monotonic() + 120
while len(over) < 3 and time.monotonic() < deadline:
    for message in decider.poll():
        if isinstance(message, Ended):
            over.append(message.trial)
        elif isinstance(message, Begun) and message.trial == "t0":
            decider.fail("t0", "the disk is full")
        elif isinstance(message, Begun):
            decider.report(message.trial, 1, 0.5, last=False)
        elif isinstance(message, WentOn) and message.trial == "t1":
            decider.fail("t1", "the loss is not finite")
        else:
            decider.report(message.trial, 2, 0.25, last=True)
    time.sleep(0.02)
decider.close()
ray_cluster.disconnect(started)
print(sorted(over))
"""


@pytest.mark.timeout(300)
def test_failed_trials_are_over_and_ray_says_nothing_of_them() -> None:
    with tempfile.TemporaryDirectory(prefix="sp-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        home = RayHome(Path(folder))
        try:
            done = subprocess.run(
                [sys.executable, "-c", CODE],
                env=home.environment(),
                capture_output=True,
                text=True,
                timeout=240,
                check=False,
            )
        finally:
            home.kill_all()
    assert done.stdout.splitlines()[-1:] == ["['t0', 't1', 't2']"], done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    assert "ERROR" not in done.stderr + done.stdout
