"""Paths that a submitted job could not use are refused, with the reason, before anything starts."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from cache_store.errors import ConfigError
from orchestrator.runs.prepare import prepare

BASE = {"model": {"name": "resnet18", "stem": "small"}, "data": {"name": "digits", "image_size": 16}}


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A job's working directory, as Ray unpacks it."""
    folder = tmp_path / "session" / "working_dir_files" / "_ray_pkg_0123456789abcdef"
    folder.mkdir(parents=True)
    (folder / "job.yaml").write_text(yaml.safe_dump(BASE))
    monkeypatch.chdir(folder)
    return folder


def refusal(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        prepare("job.yaml", overrides)
    return caught.value.message


def test_results_in_the_jobs_own_copy_are_refused(job: Path) -> None:
    message = refusal()
    assert "run_dir: runs/job: would lie in this job's copy of the working directory" in message
    assert "store" not in message, "it lies below the run directory: one mistake, one line"


def test_a_store_in_the_jobs_own_copy_is_refused(job: Path, tmp_path: Path) -> None:
    assert "store: snapshots: would lie in" in refusal(f"run_dir={tmp_path}/run", "store=snapshots")
    assert f"store: {job}/s: would lie in" in refusal(f"run_dir={tmp_path}/run", f"store={job}/s")


def test_files_that_gitignore_kept_back_are_refused_with_that_reason(job: Path, tmp_path: Path) -> None:
    message = refusal(f"run_dir={tmp_path}/run", "model.weights=weights.safetensors")
    assert "model.weights: weights.safetensors: did not travel with the job" in message
    assert ".gitignore" in message


def test_shared_places_are_taken(job: Path, tmp_path: Path) -> None:
    assert prepare("job.yaml", [f"run_dir={tmp_path}/run", f"store={tmp_path}/store"]).plan.nodes


def test_outside_a_job_relative_paths_stay_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(BASE))
    monkeypatch.chdir(tmp_path)
    assert prepare("job.yaml").config.run_dir == "runs/job"
