"""`orchestrator.trackers.tensorboard`: files TensorBoard itself reads back, the same ones every time."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from fake_run import make_summary
from summaries import read
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from orchestrator.trackers.base import EPOCH_FIGURES
from orchestrator.trackers.table import track


@pytest.fixture(scope="module")
def summary(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return make_summary(tmp_path_factory.mktemp("summary"))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_every_epoch_of_every_regime_is_read_back(tmp_path: Path, summary: dict[str, Any]) -> None:
    track(tmp_path, read(summary))
    for name, regime in summary["regimes"].items():
        epochs = [epoch for stage in regime["stages"] for epoch in stage["curve"]]
        events = EventAccumulator(str(tmp_path / "tb" / name))
        events.Reload()
        for key, tag in EPOCH_FIGURES.items():
            expected = [epoch[key] for epoch in epochs if epoch.get(key) is not None]
            if not expected:
                assert tag not in events.Tags()["scalars"]
                continue
            scalars = events.Scalars(tag)
            assert [scalar.step for scalar in scalars] == list(range(1, len(epochs) + 1))
            assert [scalar.value for scalar in scalars] == pytest.approx(expected)
        assembled = events.Scalars("assembled/accuracy")
        assert len(assembled) == len(regime["stages"])


def test_benchmarks_after_a_stage_are_read_back(tmp_path: Path, summary: dict[str, Any]) -> None:
    asked = copy.deepcopy(summary)
    stages = asked["regimes"]["segprop"]["stages"]
    for index, stage in enumerate(stages):
        stage["judged"] = {"mmlu": {"metric": "acc", "value": index / 8, "stderr": None, "n": 8, "shots": 5}}
    track(tmp_path, read(asked))
    events = EventAccumulator(str(tmp_path / "tb" / "segprop"))
    events.Reload()
    assert [scalar.value for scalar in events.Scalars("judged/mmlu")] == [index / 8 for index in range(len(stages))]


def test_scores_of_the_test_split_after_every_epoch_are_read_back(tmp_path: Path, summary: dict[str, Any]) -> None:
    tested = copy.deepcopy(summary)
    epochs = [epoch for stage in tested["regimes"]["segprop"]["stages"] for epoch in stage["curve"]]
    for index, epoch in enumerate(epochs):
        epoch["test"] = {"accuracy": index / 100, "loss": 1.5}
    epochs[0]["test_auxiliary"] = {"accuracy": 0.5, "loss": 1.25}
    track(tmp_path, read(tested))
    events = EventAccumulator(str(tmp_path / "tb" / "segprop"))
    events.Reload()
    expected = [index / 100 for index in range(len(epochs))]
    assert [scalar.value for scalar in events.Scalars("test/accuracy")] == pytest.approx(expected)
    assert [(scalar.step, scalar.value) for scalar in events.Scalars("test_auxiliary/loss")] == [(1, 1.25)]


def test_writing_again_gives_the_same_bytes_and_no_second_file(tmp_path: Path, summary: dict[str, Any]) -> None:
    track(tmp_path, read(summary))
    first = contents(tmp_path / "tb")
    track(tmp_path, read(summary))
    assert contents(tmp_path / "tb") == first
    assert [path.name for path in tmp_path.iterdir()] == ["tb"]


def test_a_regime_that_is_gone_leaves_no_folder(tmp_path: Path, summary: dict[str, Any]) -> None:
    track(tmp_path, read(summary))
    only = {**summary, "regimes": {"lw": summary["regimes"]["lw"]}}
    track(tmp_path, read(only))
    assert [path.name for path in (tmp_path / "tb").iterdir()] == ["lw"]


def test_neither_torch_nor_tensorflow_is_imported() -> None:
    code = (
        "import sys, orchestrator.trackers.tensorboard\n"
        "print([name for name in ('torch', 'tensorflow', 'ray') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[4],
    )
    assert done.stdout.strip() == "[]"
