"""Trackers while it trains: what they are told, what a run that goes on repeats, and that an outage stops nothing."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from summaries import bare_regime, bare_summary
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from orchestrator.config.compatibility import compatible
from orchestrator.trackers import live
from orchestrator.trackers.live import LiveTracking, Tracked, TrackedStage, read_points
from workers.control import Update

STAGES = {
    "n1": TrackedStage("segprop", "stage1", 0, 4),
    "n2": TrackedStage("segprop", "stage2", 8, 4),
}


def tracked(run_dir: Path, *services: str) -> Tracked:
    run_dir.mkdir(exist_ok=True)
    return Tracked("small", run_dir, "tests", services, STAGES, {"training.epochs": 2})


def update(step: int, **more: Any) -> Update:
    return Update(global_step=step, recent_loss=2.0 / step, recent_accuracy=0.5, lr=1e-3, gradient_norm=1.5, **more)


def points(run_dir: Path) -> list[dict[str, Any]]:
    return [line for line in read_points(run_dir) if "step" in line]


def story(run_dir: Path, *services: str) -> None:
    """A run that is killed in its second epoch, and goes on."""
    first = LiveTracking(tracked(run_dir, *services))
    first.tell({"n1": update(2), "other": Update(done=3)})
    first.tell({"n1": update(2)})
    first.tell({"n1": update(5, validated=1, validation_loss=0.75, validation_accuracy=0.25)})
    first.close()
    second = LiveTracking(tracked(run_dir, *services))
    second.tell({"n1": update(4, validated=1, validation_loss=0.75, validation_accuracy=0.25)})
    second.tell({"n1": update(7, validated=1, validation_loss=0.75, validation_accuracy=0.25)})
    second.tell({"n2": update(1)})
    second.close()


def test_points_count_steps_over_all_stages_and_a_run_that_goes_on_repeats_none(tmp_path: Path) -> None:
    story(tmp_path)
    assert [(line["kind"], line["step"]) for line in points(tmp_path)] == [
        ("train", 2),
        ("validation", 4),
        ("train", 5),
        ("train", 7),
        ("train", 9),
    ]
    assert points(tmp_path)[0]["figures"] == {
        "train/loss": 1.0,
        "train/accuracy": 0.5,
        "train/learning_rate": 1e-3,
        "train/gradient_norm": 1.5,
    }
    assert len([line for line in read_points(tmp_path) if "token" in line]) == 1
    events = EventAccumulator(str(tmp_path / "tb_live" / "segprop")).Reload()
    assert [(one.step, one.value) for one in events.Scalars("validation/accuracy")] == [(4, 0.25)]
    assert [one.step for one in events.Scalars("train/loss")] == [2, 5, 7, 9]


def test_what_was_not_told_while_it_trained_is_told_at_the_end(tmp_path: Path) -> None:
    story(tmp_path)
    summary = bare_summary(regimes={"segprop": bare_regime("segprop", metrics={"accuracy": 0.625})})
    tracking = LiveTracking(tracked(tmp_path))
    tracking.finish(summary)
    tracking.finish(summary)
    tracking.close()
    assert [line["figures"] for line in points(tmp_path)[5:]] == [{"test/accuracy": 0.625}]


def test_a_line_that_a_kill_cut_short_is_passed_over(tmp_path: Path) -> None:
    story(tmp_path)
    with (tmp_path / "points.jsonl").open("a") as file:
        file.write('{"regime": "segp')
    assert len(points(tmp_path)) == 5


def test_a_pipe_in_the_place_of_the_points_is_waited_for_by_nobody(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    os.mkfifo(tmp_path / "points.jsonl")
    with caplog.at_level(logging.WARNING, "segprop.trackers"):
        story(tmp_path)
    assert all("points of trackers cannot be written" in record.getMessage() for record in caplog.records)
    assert caplog.records


def test_a_service_that_fails_stops_nothing_and_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "segprop.trackers"):
        tracking = LiveTracking(tracked(tmp_path, "nowhere"))
        for step in range(1, 40):
            tracking.tell({"n1": update(step)})
        tracking.close()
    assert [record.getMessage() for record in caplog.records] == [
        "nowhere does not take small/segprop: KeyError: 'nowhere'; training goes on"
    ]
    assert len(points(tmp_path)) == 39


def test_a_service_that_hangs_is_left_behind(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live, "CLOSING_S", 1.0)
    sleeper = tmp_path / "sleeper"
    sleeper.write_text(f"#!{sys.executable}\nimport time\ntime.sleep(60)\n")
    sleeper.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(sleeper))
    with caplog.at_level(logging.WARNING, "segprop.trackers"):
        tracking = LiveTracking(tracked(tmp_path, "wandb"))
        tracking.tell({"n1": update(1)})
        tracking.close()
    assert "has not taken all of small/segprop in 1 s" in caplog.records[0].getMessage()


def test_a_run_directory_goes_on_with_other_trackers() -> None:
    old: Mapping[str, Any] = {"seed": 0, "regimes": {}}
    assert compatible(old, {**old, "tracking": {"trackers": ["wandb"]}}) == []


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Packages of services take long to load on a busy machine."""
    monkeypatch.setattr(live, "CLOSING_S", 280.0)


@pytest.mark.timeout(600)
@pytest.mark.usefixtures("patient")
def test_mlflow_goes_on_in_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow.tracking")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    story(tmp_path, "mlflow")
    client = mlflow.MlflowClient(f"file://{tmp_path}/trackers/mlruns")
    experiment = client.get_experiment_by_name("tests")
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.run_name, run.info.status) == ("small/segprop", "FINISHED")
    assert run.data.params == {"training.epochs": "2"}
    history = client.get_metric_history(run.info.run_id, "train/loss")
    assert [(one.step, one.value) for one in history] == [(2, 1.0), (5, 0.4), (7, 2 / 7), (9, 2.0)]
    assert run.data.metrics["validation/accuracy"] == 0.25


@pytest.mark.timeout(600)
@pytest.mark.usefixtures("patient")
def test_wandb_goes_on_in_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    story(tmp_path, "wandb")
    pieces = sorted((tmp_path / "trackers" / "wandb").glob("offline-run-*"))
    assert len(pieces) == 2
    # One id: `wandb sync` makes one run of them.
    assert len({piece.name.rsplit("-", 1)[1] for piece in pieces}) == 1
    written = b"".join(file.read_bytes() for piece in pieces for file in piece.glob("*.wandb"))
    assert b"train/loss" in written
    assert b"validation/accuracy" in written


@pytest.mark.timeout(600)
@pytest.mark.usefixtures("patient")
def test_trackio_goes_on_in_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("trackio")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    story(tmp_path, "trackio")
    import sqlite3

    (place,) = (tmp_path / "trackio").glob("tests*.db")
    with sqlite3.connect(place) as database:
        rows = database.execute("select run_name, step, metrics from metrics order by step").fetchall()
    assert len({name for name, _, _ in rows}) == 1
    assert [step for _, step, text in rows if "train/loss" in str(text)] == [2, 5, 7, 9]


@pytest.mark.timeout(600)
@pytest.mark.usefixtures("patient")
def test_swanlab_takes_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("swanlab")
    monkeypatch.setenv("SWANLAB_MODE", "offline")
    with caplog.at_level(logging.WARNING, "segprop.trackers"):
        story(tmp_path, "swanlab")
    assert [record.getMessage() for record in caplog.records] == []
    assert list((tmp_path / "trackers" / "swanlog").iterdir())
