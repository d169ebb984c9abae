"""The training curve inside a stage of one epoch, from what the run said while it trained."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from fake_run import make_summary
from summaries import read

from orchestrator.reports.live_points import step_curves
from orchestrator.reports.page import render
from orchestrator.reports.records import Summary


@pytest.fixture(scope="module")
def summary(tmp_path_factory: pytest.TempPathFactory) -> Summary:
    """Two stages of one epoch of ten steps, and an end-to-end stage of two epochs."""
    found = make_summary(tmp_path_factory.mktemp("summary"), regimes="[e2e, segprop]", epochs=2)
    for stage in found["regimes"]["segprop"]["stages"]:
        stage |= {"curve": stage["curve"][:1], "epochs": 1, "planned_epochs": 1, "steps": 10, "best_epoch": 0}
    return read(found)


def write(path: Path, points: list[dict[str, Any]]) -> Path:
    path.write_text('{"token": "x"}\n' + "".join(json.dumps({"kind": "train", **point}) + "\n" for point in points))
    return path


def point(summary: Summary, stage: int, step: int, loss: Any, regime: str = "segprop", **more: Any) -> dict[str, Any]:
    name = summary.regimes[regime].stages[stage].name
    return {"regime": regime, "stage": name, "step": step, "figures": {"train/loss": loss}, **more}


def test_steps_are_counted_from_the_stages_own_and_the_last_word_counts(summary: Summary, tmp_path: Path) -> None:
    said = [
        point(summary, 1, 12, 9.0),
        point(summary, 1, 12, 3.0),
        point(summary, 1, 20, 1.0),
        # Another stage's, another epoch's, no figures, no such stage, more epochs than one.
        point(summary, 0, 15, 7.0),
        point(summary, 1, 5, 7.0),
        point(summary, 1, 21, 7.0),
        point(summary, 1, 16, float("nan")),
        point(summary, 1, 17, "7"),
        {"regime": "segprop", "stage": "x", "step": 1, "figures": []},
        point(summary, 0, 1, 7.0, regime="e2e"),
        point(summary, 0, 2, 7.0, regime="e2e"),
    ]
    path = write(tmp_path / "points.jsonl", said)
    with path.open("a") as file:
        file.write('not json, "train"\n' + "[" * 5000 + '"train"\n')
    name = summary.regimes["segprop"].stages[1].name
    assert step_curves(path, summary.regimes) == {("segprop", name): {"loss": ((0.2, 3.0), (1.0, 1.0))}}
    assert step_curves(tmp_path / "absent", summary.regimes) == {}


def test_long_curves_keep_their_ends(summary: Summary, tmp_path: Path) -> None:
    found = make_summary(tmp_path, regimes="[segprop]", epochs=1)
    found["regimes"]["segprop"]["stages"][0] |= {"steps": 5000, "planned_epochs": 1, "epochs": 1}
    long = read(found)
    path = write(tmp_path / "points.jsonl", [point(long, 0, step + 1, float(step)) for step in range(5000)])
    (curves,) = step_curves(path, long.regimes).values()
    assert 200 < len(curves["loss"]) <= 241
    assert (curves["loss"][0][1], curves["loss"][-1]) == (0.0, (1.0, 4999.0))


def test_a_stage_of_one_epoch_is_a_curve_and_no_dot(summary: Summary, tmp_path: Path) -> None:
    path = write(tmp_path / "points.jsonl", [point(summary, 1, 11 + step, 2.0 - step / 10) for step in range(10)])
    page = render(summary, step_curves(path, summary.regimes))
    match = re.search(r'<g id="curves-segprop-1-steps-loss">\s*<path d="([^"]*)"', page)
    assert match is not None
    assert len(re.findall(r"[ML] ", match.group(1))) == 10
    assert '"curves-segprop-1-steps-loss"' in page.split('id="figures">')[1]
    assert "curves-segprop-0-steps" not in page
    assert "-steps-" not in render(summary)
