"""A start of Ray that fails leaves nothing running."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from running import RayHome, wait_for

#: Ray gives up as it does on a machine that is too busy: its store and its raylet run by then.
CODE = """
from ray._private import services
from cache_store.errors import SegpropError
from orchestrator.runners import ray_cluster

def late(*given, **named):
    raise Exception("The current node timed out during startup.")

services.get_node = late
try:
    ray_cluster.init({"address": "local", "include_dashboard": False, "num_cpus": 1}, attempts=2)
except SegpropError as error:
    print(error.message)
"""


@pytest.mark.timeout(300)
def test_processes_of_a_start_that_failed_are_ended() -> None:
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
            expected = "Ray does not start on this machine: The current node timed out during startup.\n"
            assert done.stdout == expected, done.stderr
            assert len(list(Path(folder).glob("ray/session_2*"))) >= 2, "two starts were tried"
            # Agents look for their raylet once in a while.
            wait_for(lambda: not home.processes(), 60, lambda: f"still there: {home.processes()}")
        finally:
            home.kill_all()
