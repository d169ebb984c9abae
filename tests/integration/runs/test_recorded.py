"""Results are written again from what a run left, without its data; those of an earlier state stay."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from lm_running import lm_changes
from PIL import Image
from running import summary_of, write_config

from orchestrator.cli import main
from orchestrator.runs.prepare import prepare
from orchestrator.runs.recorded import FILE, Recorded, read_recorded

SHAPES: dict[str, dict[str, Any]] = {
    "snapshots": {"regimes": ["e2e", "lw", "segprop"], "data.views": 2},
    "wavefront": {"regimes": ["segprop"], "pipeline": "wavefront", "wavefront.rounds": 2},
    "measured": {"regimes": ["segprop"], "snapshots.costs": "measured"},
    "turns": {"regimes": ["badam"]},
}


def folder_of_images(folder: Path, count: int = 12) -> Path:
    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (folder / name).mkdir(parents=True)
        for index in range(count):
            Image.fromarray(rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)).save(folder / name / f"{index}.png")
    return folder


def image_config(tmp_path: Path, images: Path) -> Path:
    data = {"name": "folder", "path": str(images), "image_size": 8, "augment": "none", "validation": 4}
    path = write_config(tmp_path)
    config = yaml.safe_load(path.read_text())
    config |= {"data": data, "training": {"epochs": 1, "batch_size": 8}, "regimes": ["e2e"]}
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    return path


def exported(run_dir: Path, regime: str) -> dict[str, bytes]:
    folder = run_dir / "model" / regime
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("shape", SHAPES)
def test_a_record_gives_the_plan_it_was_made_of(shape: str, tmp_path: Path) -> None:
    recorded = Recorded.of(prepare(write_config(tmp_path, SHAPES[shape])))
    recorded.run_dir.mkdir()
    (recorded.run_dir / FILE).write_bytes(recorded.to_bytes())
    assert read_recorded(recorded.run_dir, recorded.store) == recorded


def test_a_record_of_another_version_or_a_damaged_one_counts_as_none(tmp_path: Path) -> None:
    recorded = Recorded.of(prepare(write_config(tmp_path)))
    recorded.run_dir.mkdir()
    whole = recorded.to_bytes()
    for data in (whole[:-40], whole.replace(b'"format":1', b'"format":9'), b"", b"[]"):
        (recorded.run_dir / FILE).write_bytes(data)
        assert read_recorded(recorded.run_dir, recorded.store) is None


def test_report_and_export_need_no_images(tmp_path: Path) -> None:
    images = folder_of_images(tmp_path / "images")
    run_dir = tmp_path / "run"
    assert main(["run", str(image_config(tmp_path, images)), "--quiet"]) == 0
    written, scores = exported(run_dir, "e2e"), summary_of(run_dir)["regimes"]["e2e"]["final"]["metrics"]
    shutil.rmtree(images)
    shutil.rmtree(run_dir / "model")
    (run_dir / "summary.json").unlink()
    moved = tmp_path / "elsewhere"
    run_dir.rename(moved)
    assert main(["export", str(moved)]) == 0
    assert exported(moved, "e2e") == written
    assert main(["report", str(moved)]) == 0
    assert summary_of(moved)["regimes"]["e2e"]["final"]["metrics"] == scores


def test_report_and_export_of_a_language_model_need_no_text(tmp_path: Path) -> None:
    config = write_config(tmp_path, {**lm_changes(tmp_path), "regimes": ["e2e"]})
    run_dir = tmp_path / "run"
    assert main(["run", str(config), "--quiet"]) == 0
    written = exported(run_dir, "e2e")
    (tmp_path / "text.jsonl").unlink()
    shutil.rmtree(run_dir / "model")
    assert main(["export", str(run_dir)]) == 0
    assert exported(run_dir, "e2e") == written
    assert main(["report", str(run_dir)]) == 0


def test_results_of_an_earlier_state_of_the_data_stay(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = folder_of_images(tmp_path / "images")
    config, run_dir = image_config(tmp_path, images), tmp_path / "run"
    assert main(["run", str(config), "--quiet"]) == 0
    model = exported(run_dir, "e2e")
    (images / "cat" / "0.png").touch()
    assert main(["run", str(config), "--quiet"]) == 0
    assert exported(run_dir, "e2e") == model
    before = model, (run_dir / "summary.json").read_bytes()
    assert not (run_dir / "earlier").exists()
    shutil.copy(images / "cat" / "1.png", images / "dog" / "new.png")
    capsys.readouterr()
    assert main(["run", str(config), "--quiet"]) == 0
    said = capsys.readouterr().err
    assert "fingerprint of data changed" in said
    assert "earlier results are kept in" in said
    (earlier,) = (run_dir / "earlier").iterdir()
    kept = {path.name: path.read_bytes() for path in (earlier / "model" / "e2e").iterdir()}
    assert (kept, (earlier / "summary.json").read_bytes()) == before
    assert exported(run_dir, "e2e") != before[0]
