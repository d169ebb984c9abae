"""What all tests share."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, settings

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
