"""A writer killed at every operation on its storage: nothing half-written is ever seen, and a rerun completes."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from object_stores import S3Server
from running import ROOT

LOOP = Path(__file__).parents[1] / "support" / "kill_loop.py"


def kills(*arguments: str, **environment: str) -> int:
    process = subprocess.run(
        [sys.executable, str(LOOP), *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert process.returncode == 0, process.stderr[-3000:]
    return int(process.stdout)


@pytest.fixture
def quick_folder() -> Iterator[str]:
    """In memory where there is such a file system: a killed process, unlike a lost machine, loses nothing there."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(prefix="sp-", dir=memory if os.access(memory, os.W_OK) else None) as folder:
        yield folder


@pytest.mark.parametrize("when", ["before", "after"])
def test_killed_at_every_system_call_on_a_folder(quick_folder: str, when: str) -> None:
    assert kills("folder", when, quick_folder) > 80


@pytest.mark.parametrize("when", ["before", "after"])
def test_killed_at_every_request_to_an_object_store(s3: S3Server, when: str) -> None:
    assert kills("s3", when, s3.address()) > 30
