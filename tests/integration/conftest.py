"""What the integration tests share."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from object_stores import rclone, s3, seaweed  # noqa: F401  fixtures
from running import RayHome


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
