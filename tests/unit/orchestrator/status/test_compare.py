"""Runs side by side: what differs in their settings, and what each came to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from summaries import bare_regime, bare_summary

from orchestrator.cli import main
from orchestrator.reports.summary import write_summary


def run_of(folder: Path, settings: dict[str, Any], accuracy: float | None) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump({"run": folder.name, "run_dir": str(folder), **settings}))
    if accuracy is not None:
        regime = bare_regime("e2e", metrics={"accuracy": accuracy}, seconds=30.0)
        write_summary(folder / "summary.json", bare_summary(regimes={"e2e": regime}))
    return folder


@pytest.fixture
def runs(tmp_path: Path) -> list[str]:
    settings = {"seed": 0, "training": {"epochs": 3, "optimizer": {"lr": 1e-3}}}
    first = run_of(tmp_path / "runs" / "first", settings, 0.5)
    changed = {"seed": 0, "training": {"epochs": 3, "optimizer": {"lr": 1e-2}, "clip": 1.0}}
    second = run_of(tmp_path / "runs" / "second", changed, 0.75)
    return [str(first), str(second), str(run_of(tmp_path / "runs" / "third", settings, None))]


def test_settings_that_differ_and_results_stand_beside_each_other(
    runs: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compare", *runs]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == ["setting", "first", "second", "third"]
    assert ["training.optimizer.lr", "0.001", "0.01", "0.001"] in lines
    assert ["training.clip", "–", "1.0", "–"] in lines
    assert not any("seed" in line or "run_dir" in line for line in lines)
    assert "75.00" in next(" ".join(line) for line in lines if line[:2] == ["e2e", "test"])
    assert main(["compare", *runs, "--all"]) == 0
    said = capsys.readouterr().out
    assert "* training.optimizer.lr" in said
    assert "\nseed" in said


def test_the_same_as_json(runs: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", *runs, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["settings"] == {"training.optimizer.lr": [0.001, 0.01, 0.001], "training.clip": [None, 1.0, None]}
    assert [each and each["test"]["accuracy"] for each in found["results"]["e2e"]] == [0.5, 0.75, None]


def test_a_regime_that_one_run_has_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    both = {"lw": {"kind": "lw", "training": {"epochs": 3}}, "e2e": {"kind": "e2e", "training": {"epochs": 3}}}
    first = run_of(tmp_path / "first", {"regimes": both}, None)
    second = run_of(tmp_path / "second", {"regimes": {"lw": {"kind": "lw", "training": {"epochs": 4}}}}, None)
    assert main(["compare", str(first), str(second), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["settings"] == {"regimes.lw.training.epochs": [3, 4], "regimes.e2e.kind": ["e2e", None]}
    assert main(["compare", str(first), str(second), "--all"]) == 0
    assert "regimes.e2e.training.epochs" in capsys.readouterr().out


def test_what_is_no_run_or_one_alone_is_refused(
    runs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compare", runs[0]]) == 2
    assert "name two runs or more" in capsys.readouterr().err
    assert main(["compare", runs[0], str(tmp_path)]) == 2
    assert "not a run directory" in capsys.readouterr().err
    (Path(runs[1]) / "summary.json").write_text("{")
    assert main(["compare", *runs]) == 2
    assert "segprop report" in capsys.readouterr().err


def test_runs_of_several_seeds_are_summed_up_and_compared_within_a_seed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The figures of docs/results.md, worked out by hand: t with two degrees of freedom is 4.303."""
    accuracies = {0: (0.5101, 0.5089), 1: (0.5073, 0.5042), 2: (0.5127, 0.5074)}
    runs = []
    for seed, (e2e, segprop) in accuracies.items():
        folder = run_of(tmp_path / f"run-{seed}", {"seed": seed, "training": {"epochs": 3}}, None)
        regimes = {
            name: bare_regime(name, metrics={"accuracy": value}) for name, value in (("e2e", e2e), ("segprop", segprop))
        }
        write_summary(folder / "summary.json", bare_summary(regimes=regimes))
        runs.append(str(folder))
    assert main(["compare", *runs, "--json"]) == 0
    base, other = json.loads(capsys.readouterr().out)["over_seeds"]
    assert (base["regime"], base["difference"]) == ("e2e", None)
    assert other["values"] == [0.5089, 0.5042, 0.5074]
    difference = other["difference"]
    assert (difference["against"], difference["n"]) == ("e2e", 3)
    assert difference["mean"] == pytest.approx(-0.0032, abs=1e-9)
    assert difference["interval"] == pytest.approx([-0.00830, 0.00190], abs=2e-5)
    assert main(["compare", *runs]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "segprop 3 50.68 50.42 to 50.89 -0.32 to e2e -0.83 to +0.19 no difference shown" in said
