"""The list of runs in a folder: trials are as their sweep says."""

from __future__ import annotations

import json
from pathlib import Path

from orchestrator.status.listing import list_runs


def test_trials_are_as_their_sweep_last_said(tmp_path: Path) -> None:
    sweep = tmp_path / "sweep"
    for name in ("t0", "t1", "t2"):
        (sweep / "trials" / name).mkdir(parents=True)
        (sweep / "trials" / name / "config.yaml").write_text("run: x\n")
    (sweep / "config.yaml").write_text("run: x\nsweep: {}\n")
    assert [run.state for run in list_runs(tmp_path)] == ["sweep", *["waiting"] * 3]
    told = [{"folder": "t0", "status": "done"}, {"folder": "t1", "status": "stopped"}]
    (sweep / "sweep.json").write_text(json.dumps({"trials": told}))
    listed = list_runs(tmp_path)
    assert [run.state for run in listed] == ["sweep", "done", "stopped", "waiting"]
    assert {run.reason for run in listed} == {None}
    # A run beside it that left nothing is still unknown, with the reason.
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.yaml").write_text("run: x\n")
    assert next(iter(list_runs(tmp_path))).state == "unknown"
