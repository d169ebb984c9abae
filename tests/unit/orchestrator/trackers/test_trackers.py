"""`orchestrator.trackers`: every run fills the trackers of the table, and a tracker is one row of it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fake_run import make_summary
from summaries import read

from cache_store.errors import StoreError
from orchestrator.runs.prepare import prepare
from orchestrator.runs.run_dir import claim_run_dir
from orchestrator.runs.session import execute
from orchestrator.trackers.base import LoggedPoint, Tracker
from orchestrator.trackers.live import read_points
from orchestrator.trackers.table import TRACKERS, track

ROOT = Path(__file__).parents[4]


class JsonLines:
    """A tracker that writes a line a point."""

    def __init__(self) -> None:
        self.lines: list[dict[str, Any]] = []

    def start(self, regime: str, when: float) -> None:
        self.regime = regime

    def log(self, point: LoggedPoint) -> None:
        self.lines.append({"regime": self.regime, "step": point.step, **point.figures})


@contextmanager
def json_lines(run_dir: Path) -> Iterator[Tracker]:
    tracker = JsonLines()
    yield tracker
    (run_dir / "lines.jsonl").write_text("".join(json.dumps(line) + "\n" for line in tracker.lines))


def test_one_more_row_is_filled_by_a_real_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TRACKERS, "json_lines", json_lines)
    run_dir = tmp_path / "run"
    small = ["data.train_limit=96", "data.test_limit=64", "data.validation=48", "training.batch_size=32"]
    settings = [*small, "training.epochs=2", "data.image_size=8", "resources.runner=local", "regimes=[e2e, segprop]"]
    prepared = prepare(ROOT / "configs" / "quickstart.yaml", [f"run_dir={run_dir}", *settings])
    claim_run_dir(prepared)
    assert execute(prepared, quiet=True) == 0
    lines = [json.loads(line) for line in (run_dir / "lines.jsonl").read_text().splitlines()]
    summary = json.loads((run_dir / "summary.json").read_text())
    for name, regime in summary["regimes"].items():
        curve = [epoch for stage in regime["stages"] for epoch in stage["curve"]]
        mine = [line for line in lines if line["regime"] == name and "train/loss" in line]
        assert [line["step"] for line in mine] == list(range(1, len(curve) + 1))
        assert [line["train/loss"] for line in mine] == [epoch["train_loss"] for epoch in curve]
        # What trackers were told while it trained has the last validation of every stage, and those of earlier epochs
        # that were not over before the next look; and the end's score.
        mine = [point for point in read_points(run_dir) if point.get("regime") == name]
        told = sorted(mine, key=lambda point: point["step"])
        validated = [point["figures"]["validation/loss"] for point in told if point["kind"] == "validation"]
        losses = [epoch["validation_loss"] for epoch in curve]
        assert [loss for loss in losses if loss in validated] == validated
        assert {stage["curve"][-1]["validation_loss"] for stage in regime["stages"]} <= set(validated)
        assert told[-1]["figures"]["test/accuracy"] == regime["final"]["metrics"]["accuracy"]
    assert {line["regime"] for line in lines} == {"e2e", "segprop"}
    assert (run_dir / "tb" / "segprop").is_dir()


def test_a_tracker_that_fails_on_the_way_keeps_what_was_there(tmp_path: Path) -> None:
    summary = read(make_summary(tmp_path, epochs=2))
    track(tmp_path, summary)
    before = sorted(path.name for path in (tmp_path / "tb").iterdir())
    broken = replace(summary, regimes={"e2e": summary.regimes["e2e"], "": summary.regimes["segprop"]})
    with pytest.raises(StoreError, match="File exists"):
        track(tmp_path, broken)
    assert sorted(path.name for path in (tmp_path / "tb").iterdir()) == before
    assert not list(tmp_path.glob(".tb*"))
