"""Trials as a table, and what a filter leaves of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from orchestrator.ui.records import Part, RegimeView, SweepTable
from orchestrator.ui.sweep_view import filtered, magnitude, sweep_table

TABLE = SweepTable(
    metric="segprop.validation.accuracy",
    heads=("trial", "lr", "status", "segprop.validation.accuracy", "test"),
    rows=(
        ("t0", "0.001", "done", "97.30 %", "96.00 %"),
        ("t1", "0.01", "done", "91.00 %", "90.00 %"),
        ("t2", "0.1", "failed", "–", "–"),
    ),
    paths=("s/trials/a", "s/trials/b", "s/trials/c"),
    best=(True, False, False),
    total=3,
)


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("", ["t0", "t1", "t2"]),
        ("done", ["t0", "t1"]),
        ("lr<0.05", ["t0", "t1"]),
        ("lr<=1e-2 status=done", ["t0", "t1"]),
        ("lr=1e-3", ["t0"]),
        ("seg>95", ["t0"]),
        ("test>=90 lr>0.001", ["t1"]),
        ("STATUS=failed", ["t2"]),
        ("nothing<1", []),
        ("<script>", []),
    ],
)
def test_a_filter_takes_words_and_columns(text: str, left: list[str]) -> None:
    found = filtered(TABLE, text)
    assert [row[0] for row in found.rows] == left
    assert found.shown == len(left) == len(found.paths) == len(found.best)
    assert found.total == 3


@pytest.mark.parametrize(
    ("cell", "value"),
    [
        *(("97.30 %", 97.3), ("3 min 20 s", 200.0), ("2 h 05 min", 7500.0), ("0.42 s", 0.42), ("1.2 GB", 1.2e9)),
        *(("500MB", 5e8), ("11.2 M", 11.2e6), ("2 of 3", 2.0), ("(91.00 %)", 91.0), ("1e-3", 0.001), ("1,234", 1234.0)),
        *(("-5", -5.0), ("–", None), ("t0", None), ("", None), ("segprop 50 %", None), ("7 d of 3 x", 604800.0)),
    ],
)
def test_cells_are_compared_with_their_units(cell: str, value: float | None) -> None:
    assert magnitude(cell) == (None if value is None else pytest.approx(value))


def test_while_a_sweep_runs_its_trials_are_told_by_its_driver(tmp_path: Path) -> None:
    sweep = {"run": "s", "sweep": {"parameters": {"training.optimizer.lr": {"grid": [1, 2]}}}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(sweep))
    for name, folder, lr in (("t1", "lr=2", 2), ("t0", "lr=1", 1)):
        place = tmp_path / "trials" / folder
        place.mkdir(parents=True)
        settings = {"run": f"s-{name}", "training": {"optimizer": {"lr": lr}}}
        (place / "config.yaml").write_text(yaml.safe_dump(settings))
    done = Part("stage1", True, "stored", 1, 1, None, "")
    waits = Part("stage2", True, "waiting", 0, 1, None, "")
    regimes = [
        RegimeView("t0/segprop", 0, "", "running", "accuracy 50.00 %", "", (done, waits)),
        RegimeView("t1/segprop", 0, "", "waiting", "", "", (waits, waits)),
    ]
    table = sweep_table(tmp_path, "s", regimes, running=True)
    assert table.heads == ("trial", "lr", "status", "stages", "validation", "test")
    assert table.rows == (
        ("t0", "1", "running", "1 of 2", "segprop accuracy 50.00 %", "–"),
        ("t1", "2", "waiting", "0 of 2", "–", "–"),
    )
    assert table.paths == ("s/trials/lr=1", "s/trials/lr=2")
