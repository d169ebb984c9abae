"""A Ray cluster of two CPUs with a token of its own."""

from __future__ import annotations

import secrets
import subprocess
import sys
from collections.abc import Iterator

import pytest
from running import RayHome

#: Of the test's own cluster: whoever joins it needs a token, and this one is made up here.
TOKEN = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
HEAD = """
import ray, sys
context = ray.init(
    address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, _temp_dir=sys.argv[1] + "/shared"
)
print(context.address_info["gcs_address"], flush=True)
sys.stdin.read()
"""


@pytest.fixture(scope="module")
def cluster(ray_home: RayHome) -> Iterator[str]:
    """Address of a cluster of two CPUs."""
    head = subprocess.Popen(
        [sys.executable, "-c", HEAD, str(ray_home.folder)],
        env=ray_home.environment(**TOKEN),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert head.stdout is not None
    yield head.stdout.readline().strip()
    head.communicate("", timeout=60)
