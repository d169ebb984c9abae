"""Sweeps on real Ray: shared work runs once, a killed sweep goes on, Ray Tune stops and exchanges trials."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
from ray_cluster import TOKEN, cluster  # noqa: F401  a fixture
from running import ROOT, RayHome, wait_for, write_config

from orchestrator.cli import main
from orchestrator.sweeps.prepare import prepare_sweep

SMALL: dict[str, Any] = {"training.epochs": 1, "data.train_limit": 48, "evaluation.stages": False}


def on(address: str) -> dict[str, Any]:
    return {"resources": {"runner": "ray", "device": "cpu", "slots": 2, "threads": 1, "address": address}}


def result_of(run: Path) -> dict[str, Any]:
    summary: dict[str, Any] = json.loads((run / "sweep.json").read_text())
    return summary


def attempts(run: Path) -> dict[str, int]:
    """Node -> attempts that wrote a file."""
    return {node.name: len(list(node.glob("attempts/*"))) for node in (run / "store" / "nodes").iterdir()}


def commits(run: Path) -> list[Path]:
    return list((run / "store" / "nodes").glob("*/commit.json"))


def test_a_sweep_in_one_process_shares_what_is_equal_and_reports(tmp_path: Path) -> None:
    config = write_config(
        tmp_path,
        {
            **SMALL,
            "regimes": ["e2e", "segprop"],
            "split.base": 2,
            "sweep": {"parameters": {"split.segment_size": {"grid": [1, 2]}}},
        },
    )
    assert main(["run", str(config), "--quiet"]) == 0
    run = tmp_path / "run"
    summary = result_of(run)
    assert summary["status"] == "done"
    stages = summary["sharing"]["kinds"]["train"]
    assert (stages["asked"], stages["run"]) == (2 + 3 + 2, 1 + 3 + 1)
    assert set(attempts(run).values()) <= {0, 1}, "nothing ran twice"
    assert (run / "report.html").stat().st_size > 20_000
    for trial in summary["trials"]:
        folder = run / trial["folder"]
        own = json.loads((folder / "summary.json").read_text())
        assert own["status"] == "done"
        assert own["regimes"]["segprop"]["final"]["validation"]["accuracy"] == trial["metric"]
        assert (folder / "report.html").exists()
        assert (folder / "model" / "segprop").exists() == trial["best"]
    # A trial's folder is a run directory: its model can be written later, without training.
    other = next(trial for trial in summary["trials"] if not trial["best"])
    assert main(["export", str(run / other["folder"])]) == 0
    assert (run / other["folder"] / "model" / "segprop").exists()
    assert main(["report", str(run)]) == 0
    assert result_of(run)["best"] == summary["best"]
    assert set(attempts(run).values()) <= {0, 1}


@pytest.mark.long
@pytest.mark.timeout(600)
def test_a_killed_sweep_goes_on_and_asha_stops_the_hopeless(
    tmp_path: Path,
    cluster: str,  # noqa: F811
    ray_home: RayHome,
) -> None:
    # Two that learn, and two that do not.
    config = write_config(
        tmp_path,
        {
            **SMALL,
            **on(cluster),
            "training.epochs": 4,
            "data.train_limit": 96,
            "regimes": ["segprop"],
            "split.base": 2,
            "sweep": {
                "parameters": {"training.optimizer.lr": {"grid": [1e-3, 2e-3, 1e-8, 1e-7]}},
                "scheduler": {"name": "asha"},
                "metric": "segprop.validation.loss",
                "concurrency": 2,
            },
        },
    )
    run, output = tmp_path / "run", tmp_path / "output.txt"
    driver = ray_home.start(str(config), output=output, **TOKEN)
    wait_for(lambda: len(commits(run)) >= 6, 300, output.read_text)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    before = {path: path.stat().st_mtime_ns for path in commits(run)}

    assert ray_home.start(str(config), output=output, **TOKEN).wait(timeout=400) == 0, output.read_text()
    summary = result_of(run)
    assert summary["status"] == "done"
    assert {path: path.stat().st_mtime_ns for path in before} == before, "what was finished is not touched"
    assert summary["sharing"]["before"] >= len(before)
    statuses = {trial["parameters"]["training.optimizer.lr"]: trial["status"] for trial in summary["trials"]}
    assert {statuses[1e-7], statuses[1e-8]} == {"stopped"}, summary["trials"]
    assert statuses[1e-3] == "done"
    stopped = [trial for trial in summary["trials"] if trial["status"] == "stopped"]
    prepared = prepare_sweep(config)
    for trial in stopped:
        plan = next(found for found in prepared.trials if found.name == trial["name"]).prepared.plan
        stages = plan.regimes["segprop"].stages
        done = [node for node in stages if (run / "store" / "nodes" / node / "commit.json").exists()]
        assert len(done) == trial["rungs"][-1]["stages"] < len(stages), "a stopped trial trains no further"
    # The order of the decisions is kept, so that the next interruption changes nothing either.
    decided = [json.loads(line) for line in (run / "decisions.jsonl").read_text().splitlines()]
    assert len(decided) == sum(len(trial["rungs"]) for trial in summary["trials"])
    assert "stopped" in output.read_text()
    # Made again from the store, it says the same.
    assert main(["report", str(run)]) == 0
    again = result_of(run)
    assert [trial["status"] for trial in again["trials"]] == [trial["status"] for trial in summary["trials"]]
    assert again["sharing"]["kinds"] == summary["sharing"]["kinds"]


@pytest.mark.timeout(600)
def test_pbt_hands_stages_over_and_goes_on_with_other_settings(
    tmp_path: Path,
    cluster: str,  # noqa: F811
    ray_home: RayHome,
) -> None:
    config = write_config(
        tmp_path,
        {
            **SMALL,
            **on(cluster),
            "training.epochs": 2,
            "data.train_limit": 96,
            "regimes": ["segprop"],
            "sweep": {
                "parameters": {"training.optimizer.lr": {"grid": [1e-3, 1e-7]}},
                "scheduler": {"name": "pbt", "quantile": 0.5},
                "metric": "segprop.validation.loss",
            },
        },
    )
    output = tmp_path / "output.txt"
    assert ray_home.start(str(config), output=output, **TOKEN).wait(timeout=400) == 0, output.read_text()
    summary = result_of(tmp_path / "run")
    assert [trial["status"] for trial in summary["trials"]] == ["done", "done"], summary["trials"]
    taken = [trial for trial in summary["trials"] if trial["history"]]
    assert taken, "the trial that learns nothing took over the other's stages"
    assert taken[0]["history"][0] == {"training.optimizer.lr": 1e-3}
    stages = summary["sharing"]["kinds"]["train"]
    assert stages["run"] < stages["asked"], "stages that were taken over are shared"
    # What it came to is an ordinary configuration: its folder has it.
    written = (tmp_path / "run" / taken[0]["folder"] / "config.yaml").read_text()
    assert "stage1-base" in written


def test_the_shipped_digits_sweep_shares_visibly() -> None:
    sweep = prepare_sweep(ROOT / "configs" / "digits_sweep.yaml")
    nodes = [trial.prepared.plan.nodes for trial in sweep.trials]
    asked = sum(node.kind == "train" for plan in nodes for node in plan)
    run = sum(node.kind == "train" for node in sweep.plan.nodes)
    assert (asked, run) == (29, 17)
