"""Neither a start of Ray that fails nor the end of a run leaves anything running."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from running import RayHome, wait_for

#: Ray gives up as it does on a machine that is too busy: its store and its raylet run by then.
FAILED = """
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


#: A process that Ray does not know: of a task's own processes it ends the direct ones at most.
UNKNOWN = """
import subprocess
import ray
from orchestrator.runners import ray_cluster

@ray.remote(num_cpus=1)
def start():
    subprocess.Popen(["sh", "-c", "sleep 600; true"], start_new_session=True)

started = ray_cluster.connect(None, 1)
ray.get(start.remote())
ray_cluster.disconnect(started)
"""


@pytest.fixture
def home() -> Iterator[RayHome]:
    with tempfile.TemporaryDirectory(prefix="sp-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        home = RayHome(Path(folder))
        yield home
        home.kill_all()


def run(home: RayHome, code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env=home.environment(),
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


@pytest.mark.timeout(300)
def test_processes_of_a_start_that_failed_are_ended(home: RayHome) -> None:
    done = run(home, FAILED)
    expected = "Ray does not start on this machine: The current node timed out during startup.\n"
    assert done.stdout == expected, done.stderr
    assert len(list(home.folder.glob("ray/session_2*"))) >= 2, "two starts were tried"
    # Agents look for their raylet once in a while.
    wait_for(lambda: not home.processes(), 60, lambda: f"still there: {home.processes()}")


@pytest.mark.timeout(300)
def test_a_process_that_ray_does_not_know_is_ended_with_it(home: RayHome) -> None:
    done = run(home, UNKNOWN)
    assert done.returncode == 0, done.stderr
    assert home.processes() == {}
