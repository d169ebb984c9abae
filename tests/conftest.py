"""What all tests share."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings
from object_stores import rclone, s3, seaweed  # noqa: F401  fixtures
from running import RayHome

#: Files that take longest, in the order in which they are begun: at the end no process works on alone.
SLOWEST = (
    "test_killed_run",
    "test_cluster",
    "test_ray",
    "test_production",
    "test_sweep_runs",
    "test_storage_faults",
    "test_two_drivers",
    "test_runs_s3",
    "test_runs",
    "test_judge",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    place = {name: index for index, name in enumerate(SLOWEST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(SLOWEST)))


# How fast the machine is says nothing about the code: a busy one must not fail a test.
settings.register_profile("segprop", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("segprop")


@pytest.fixture(autouse=True)
def _torch_settings() -> Iterator[None]:
    """Tasks set threads and determinism for their process, which here is the tests' own."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def ray_home() -> Iterator[RayHome]:
    """A place for Ray's sessions; short, since paths of Unix sockets are. Nothing of it is left behind."""
    with tempfile.TemporaryDirectory(prefix="sp-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        home = RayHome(Path(folder))
        yield home
        home.kill_all()
