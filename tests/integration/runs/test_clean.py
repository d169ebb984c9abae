"""Listing the runs in a folder, and freeing what finished ones no longer need."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from running import TINY, tree, write_config

from cache_store.storage.open import open_storage
from orchestrator.cli import main
from orchestrator.execution.commits import CommitLog
from orchestrator.runs.prepare import prepare


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run whose store also holds the work of another seed's."""
    folder = tmp_path_factory.mktemp("finished")
    config = write_config(folder, {"regimes": ["e2e"], "training.epochs": 1})
    other = ["seed=5", f"store={folder}/run/store", f"run_dir={folder}/other"]
    assert main(["run", str(config), *other, "--quiet"]) == 0
    assert main(["run", str(config), "--quiet"]) == 0
    return folder


@pytest.fixture
def runs(finished: Path, tmp_path: Path) -> Path:
    shutil.copytree(finished, tmp_path / "runs")
    shutil.rmtree(tmp_path / "runs" / "other")
    return tmp_path / "runs"


def test_a_folder_of_runs_is_listed_with_state_size_and_score(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    begun = runs / "begun"
    begun.mkdir()
    (begun / "config.yaml").write_text(yaml.safe_dump({**TINY, "run_dir": str(begun)}))
    assert main(["status", str(runs), "--json"]) == 0
    one, two = json.loads(capsys.readouterr().out)
    assert (Path(one["path"]).name, one["state"], one["reason"]) == (
        "begun",
        "unknown",
        "it left no record in its store",
    )
    assert (Path(two["path"]).name, two["state"]) == ("run", "done")
    assert two["bytes"] > two["store_bytes"] > two["model_bytes"] > 1_000_000
    summary = json.loads((runs / "run" / "summary.json").read_text())
    assert two["scores"]["e2e"]["accuracy"] == summary["regimes"]["e2e"]["final"]["metrics"]["accuracy"]
    assert main(["status", str(runs)]) == 0
    said = capsys.readouterr().out
    assert "2 runs" in said
    assert "e2e" in said
    assert main(["status", str(runs / "run" / "model")]) == 2
    assert "no run directory, it has no config.yaml" in capsys.readouterr().err


def test_what_the_run_no_longer_has_goes_and_the_rest_of_it_stays(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = runs / "run"
    config = write_config(runs, {"regimes": ["e2e"], "training.epochs": 1})
    before = tree(run_dir)
    assert main(["clean", str(runs), "--dry-run"]) == 0
    assert "would free" in capsys.readouterr().out
    assert tree(run_dir) == before
    plan = prepare(config).plan
    storage = open_storage(str(run_dir / "store"))
    others = set(storage.list("nodes")) - {node.id for node in plan.nodes}
    assert others
    assert main(["clean", str(run_dir)]) == 0
    assert set(storage.list("nodes")) == {node.id for node in plan.nodes}
    assert len(CommitLog.read(storage, plan).commits) == len(plan.nodes)
    assert main(["cache", "verify", str(run_dir)]) == 0
    # Nothing has to be done again.
    capsys.readouterr()
    assert main(["run", str(config), "--dry-run"]) == 0
    assert f"{len(plan.nodes)} of {len(plan.nodes)} nodes are finished" in capsys.readouterr().out


def test_a_store_goes_as_a_whole_when_asked_and_the_models_stay(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = runs / "run"
    models = tree(run_dir / "model")
    shutil.move(run_dir / "model", runs / "aside")
    assert main(["clean", str(run_dir), "--store", "--yes"]) == 0
    assert "no model was exported" in capsys.readouterr().out
    assert (run_dir / "store").is_dir()
    shutil.move(runs / "aside", run_dir / "model")
    assert main(["clean", str(run_dir), "--store", "--yes"]) == 0
    assert not (run_dir / "store").exists()
    assert tree(run_dir / "model") == models
    assert (run_dir / "report.html").exists()


def test_unfinished_runs_and_foreign_stores_are_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, more in (("begun", {}), ("shared", {"store": str(tmp_path / "pool")})):
        settings: dict[str, Any] = {**TINY, "run_dir": str(tmp_path / name), **more}
        (tmp_path / name / "store").mkdir(parents=True)
        (tmp_path / name / "config.yaml").write_text(yaml.safe_dump(settings))
    assert main(["clean", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "it is not finished" in said
    assert "may be other runs' too" in said
    assert main(["clean", str(tmp_path / "nowhere")]) == 2
    assert "neither a run directory nor a folder with some" in capsys.readouterr().err
