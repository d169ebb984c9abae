"""A stage killed inside checkpoints that are written beside its steps."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from checkpoint_kills import KILLS
from running import ROOT


@pytest.mark.timeout(900)
def test_a_stage_killed_inside_its_checkpoints_ends_with_the_same_bits(tmp_path: Path) -> None:
    program = ROOT / "tests" / "support" / "checkpoint_kills.py"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(program.parent)])}
    done = subprocess.run(
        [sys.executable, str(program), str(tmp_path)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["points"] == [f"{point}:{visit}" for point, visit, _ in KILLS], "every kill happened"
    assert all(run["parts"] == found["reference"] for run in found["ended"])
    assert sum(run["resumed"] for run in found["ended"]) >= 5
    assert all(run["left"] == [] for run in found["ended"])
