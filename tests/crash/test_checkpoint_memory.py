"""A stage with checkpoints takes little more memory than one without."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from running import ROOT

#: What checkpoints may take beside the state.
ALLOWED = 64_000_000


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc, and a limit on private memory")
@pytest.mark.timeout(900)
def test_a_stage_with_a_checkpoint_after_every_step_stays_within_64_mb_of_one_without(tmp_path: Path) -> None:
    program = ROOT / "tests" / "support" / "checkpoint_memory.py"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(program.parent)])}
    done = subprocess.run(
        [sys.executable, str(program), str(tmp_path), str(ALLOWED)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["checkpoints"] >= 8
    assert found["state"] > 2 * ALLOWED, "a copy of the state would not have gone unnoticed"
    assert found["peak"] <= found["without"] + ALLOWED
