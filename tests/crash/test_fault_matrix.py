"""A sample of `make test-matrix`: what is broken in the middle of a run ends right, or is told and ends right then."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from matrix import FAULTS, MOMENTS, STORES, Case, every_case, pairwise

ROOT = Path(__file__).parents[2]


def test_the_chosen_cases_hold_every_pair_there_is() -> None:
    cases = every_case()
    chosen = pairwise(cases, 0)
    assert len(set(chosen)) == len(chosen) < len(cases)
    assert set().union(*(case.pairs for case in chosen)) == set().union(*(case.pairs for case in cases))
    assert {case.moment for case in chosen} == set(MOMENTS)
    assert {case.store for case in chosen} == set(STORES)
    assert {(case.fault, case.target) for case in chosen} == {(f, t) for f, targets in FAULTS.items() for t in targets}
    assert Case("full", "disk", "stage", "s3") not in cases
    assert pairwise(cases, 0) == chosen != pairwise(cases, 1)


@pytest.mark.long
@pytest.mark.timeout(1500)
def test_a_sample_of_the_matrix(tmp_path: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "SEGPROP_"))}
    path = os.pathsep.join((str(ROOT), str(ROOT / "tests" / "support")))
    out = tmp_path / "matrix.jsonl"
    program = [sys.executable, "tests/support/matrix.py", "--out", str(out), "--only", "killed, stage, folder"]
    done = subprocess.run(
        [*program, "--all", "--count", "2"],
        cwd=ROOT,
        env={**environment, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    played = [json.loads(line) for line in out.read_text().splitlines()]
    assert [each["target"] for each in played] == ["driver", "worker"]
    assert [each["codes"] for each in played] == [[-9, 0], [0]]
    assert all("train" in each["during"] for each in played), "they struck while stages trained"
