"""The tests here need a CUDA device; `make test` leaves them out, `make test-cuda` runs them."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from running import DEVICE, RayHome


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if items and not (DEVICE.type == "cuda" and torch.cuda.is_available()):
        raise pytest.UsageError("tests/cuda needs a CUDA device and SEGPROP_TEST_DEVICE=cuda: see make test-cuda")


@pytest.fixture
def home() -> Iterator[RayHome]:
    """Starts the program as a process of its own; without Ray."""
    with tempfile.TemporaryDirectory(prefix="sp-") as folder:
        found = RayHome(Path(folder))
        yield found
        found.kill_all()
