"""A sample of `make test-damage`: whatever a file of a run has become, nothing is silently wrong and nothing hangs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.timeout(900)
def test_damaged_files_of_a_run_give_the_same_tensors_or_an_error_in_our_words() -> None:
    program = [sys.executable, "tests/support/damage.py", "--seconds", "40", "--seed", "3"]
    found = subprocess.run(
        program, cwd=ROOT, env={**_environment(), "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, found.stdout[-6000:] + found.stderr[-2000:]
    assert "mutations from seed 3" in found.stdout


def _environment() -> dict[str, str]:
    return {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "SEGPROP_"))}
