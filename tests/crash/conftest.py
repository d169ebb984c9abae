"""The crash tests use the integration tests' fixtures."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from object_stores import rclone, s3, seaweed  # noqa: F401  fixtures
from running import RayHome


@pytest.fixture
def ray_home() -> Iterator[RayHome]:
    """A place for Ray's sessions; short, since paths of Unix sockets are. Nothing of it is left behind."""
    with tempfile.TemporaryDirectory(prefix="sp-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        home = RayHome(Path(folder))
        yield home
        home.kill_all()
