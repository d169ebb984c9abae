"""`segprop profile` on real stages: a trace that opens, a table that adds up, and a run that stays as it is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from running import Lab, tree, write_config

from orchestrator.cli import main
from orchestrator.profiling import FIGURES, TABLES, TRACE
from workers.specs.results import PHASES, TimeSpent


def test_a_profile_writes_a_trace_and_tables_and_leaves_the_run_as_it_is(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    lab = Lab.make(tmp_path, {"training.epochs": 1})
    lab.run("segprop/stage1-base")
    before = tree(tmp_path)
    config = tmp_path / "tiny.yaml"
    # The steps are more than an epoch has: it begins again.
    assert main(["profile", str(config), "--stage", "2", "--steps", "7", "--out", "out"]) == 0
    said = capfd.readouterr().out
    out = tmp_path / "out"
    assert {path: state for path, state in tree(tmp_path).items() if not path.startswith("out/")} == before
    assert {path.name for path in out.iterdir()} == {TRACE, FIGURES, TABLES}

    ranges = [event["name"] for event in json.loads((out / TRACE).read_text())["traceEvents"] if "name" in event]
    assert [ranges.count(f"segprop: {phase}") for phase in ("forward", "backward", "update")] == [5, 5, 5]
    assert ranges.count("segprop: forward seg2") == 5
    assert "aten::convolution_backward" in ranges

    figures = json.loads((out / FIGURES).read_text())
    times = TimeSpent.from_json(figures["times"])
    assert (times.steps, times.looked_at) == (7, 7)
    assert times.seconds == pytest.approx(sum(times.phases.values()))
    assert set(times.phases) <= set(PHASES)
    assert min(times.phases[phase] for phase in ("forward", "backward", "update")) > 0
    assert set(times.forward) == {"seg2", "adapter", "head"}
    assert figures["operators"][0]["host_seconds"] > 0
    # What the store has is used: only the parts of stages that did not run have their initial weights.
    assert figures["notes"][0].startswith("the snapshots of the first")
    assert len(figures["notes"]) == 1
    assert "by phase, in ms a step" in said
    assert "by phase, in ms a step" in (out / TABLES).read_text()


def test_without_a_run_initial_weights_stand_in_and_no_run_directory_is_made(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = write_config(tmp_path, {"regimes": {"segprop": {"snapshots": {"mode": "never"}}}})
    arguments = ["profile", str(config), "--stage", "stage2-seg2", "--steps", "2", "--json"]
    assert main(arguments) == 0
    found = json.loads(capfd.readouterr().out)
    missing, weights = found["notes"]
    assert "there is no store here" in missing
    assert weights == "initial weights stand in for seg1, head: the store has no commit of what trains them"
    assert found["times"]["phases"]["prefix"] > 0
    assert {path.name for path in tmp_path.iterdir()} == {"tiny.yaml", "profiles"}
    assert main(["profile", str(config), "--stage", "stage2-sag2"]) == 2
    assert "did you mean 'stage2-seg2'?" in capfd.readouterr().err
