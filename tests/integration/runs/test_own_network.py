"""The example of a network and data of one's own, from a fresh folder outside the repository."""

from __future__ import annotations

import json
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from planning import merged
from running import ROOT, Lab, RayHome, final_digests, summary_of
from torch.nn import functional as F

import segprop
from cache_store.snapshots.store import SnapshotStore
from orchestrator.cli import main
from orchestrator.runs.prepare import prepare
from workers.data.images.source import ImageSource
from workers.environment import prepare_process
from workers.models.python.building import build
from workers.seeds import derive_seed
from workers.specs import as_json
from workers.specs.data_results import ImageDataResult
from workers.specs.tasks import StageTask
from workers.training.shuffle import epoch_order

SMALL = {
    "training": {"epochs": 2, "batch_size": 16, "commit": "last"},
    "snapshots": {"mode": "always", "group_rows": 16},
    "resources": {"runner": "local", "device": "cpu", "slots": 1, "threads": 1},
}


def copy_of_example(folder: Path, changes: dict[str, object] | None = None) -> Path:
    """The example's files in a fresh folder, with 200 images, and a configuration of a small run."""
    shutil.copytree(ROOT / "examples" / "own_network", folder)
    runpy.run_path(str(folder / "make_images.py"))["make"](folder, 200)
    config = folder / "own_network.yaml"
    settings = merged(yaml.safe_load(config.read_text()), {**SMALL, "run_dir": str(folder / "run"), **(changes or {})})
    config.write_text(yaml.safe_dump(settings))
    return config


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in every regime."""
    config = copy_of_example(tmp_path_factory.mktemp("own") / "example")
    assert main(["run", str(config), "--quiet"]) == 0
    return config


def test_every_regime_trains_it_and_what_is_loaded_scores_as_the_run_says(finished: Path) -> None:
    run_dir = finished.parent / "run"
    summary = summary_of(run_dir)
    assert [stage["name"] for stage in summary["regimes"]["segprop"]["stages"]] == [
        "stage1-base",
        "stage2-level1",
        "stage3-level2",
    ]
    assert [stage["auxiliary"] for stage in summary["regimes"]["lw"]["stages"]] == [True, True, True, False]
    test = runpy.run_path(str(finished.parent / "mydata.py"))["splits"]()["test"]
    images = torch.stack([image for image, _ in test]).float() / 255
    labels = torch.tensor([label for _, label in test])
    for name, regime in summary["regimes"].items():
        assert regime["status"] == "done", name
        with torch.inference_mode():
            loss = F.cross_entropy(segprop.load(run_dir, name)(images), labels).item()
        assert loss == pytest.approx(regime["final"]["metrics"]["loss"], rel=1e-5), name


def test_an_export_is_loaded_by_its_own_source_without_the_folder_it_came_from(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished.parent / "run" / "model" / "e2e", tmp_path / "e2e")
    (tmp_path / "mynets.py").write_text("raise RuntimeError('another module of that name')")
    code = "import sys; sys.path.insert(0, '.'); from e2e.load_model import load; print(type(load()).__name__)"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == "Chain", done.stderr


def test_e2e_equals_the_modules_own_training_to_the_bit(finished: Path) -> None:
    lab = Lab(prepare(finished))
    task = as_json.from_json(StageTask, lab.node("e2e/e2e").task)
    data = lab.commit("data").read(ImageDataResult)
    images = ImageSource(task.experiment, data, SnapshotStore(lab.storage), "train")
    train, seed = task.train, task.experiment.seed
    prepare_process(torch.device("cpu"), 1, deterministic=True)
    network = build(task.experiment.model, seed).train()  # type: ignore[arg-type]
    optimizer = torch.optim.AdamW(
        network.parameters(), lr=train.optimizer.lr, weight_decay=train.optimizer.weight_decay, fused=True
    )
    torch.manual_seed(derive_seed(seed, "stage", task.name))
    size = train.batch_size
    for epoch in range(train.epochs):
        order = epoch_order(seed, epoch, images.rows)
        for start in range(0, images.rows - size + 1, size):
            rows = order[start : start + size]
            F.cross_entropy(network(images.batch(rows, 0)), images.labels[torch.from_numpy(rows)]).backward()
            optimizer.step()
            optimizer.zero_grad()
    trained = {name.partition("/")[2]: tensor for name, tensor in lab.weights("e2e/e2e").items()}
    expected = network.state_dict()
    assert trained.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(trained[name], expected[name])] == []


def test_other_source_trains_anew_and_a_comment_elsewhere_does_not(finished: Path) -> None:
    folder = finished.parent
    before = {node.label: node.id for node in prepare(finished).plan.nodes}
    (folder / "beside.py").write_text("# nothing imports it")
    assert {node.label: node.id for node in prepare(finished).plan.nodes} == before
    source = (folder / "mynets.py").read_text()
    try:
        (folder / "mynets.py").write_text(source.replace("nn.ReLU()", "nn.GELU()"))
        after = {node.label: node.id for node in prepare(finished).plan.nodes}
    finally:
        (folder / "mynets.py").write_text(source)
    assert after["data"] == before["data"]
    assert [label for label in before if after[label] == before[label]] == ["data"]


def test_it_runs_from_python_and_gives_figures_of_every_epoch(finished: Path) -> None:
    run = segprop.run(finished, quiet=True)
    assert run.accuracy.keys() == run.models.keys() == {"e2e", "lw", "segprop"}
    # 1 + 4 + 3 stages of two epochs.
    assert len(run.metrics) == 16
    assert {"regime", "stage", "epoch", "train_loss", "validation_accuracy"} <= run.metrics[0].keys()
    pandas = pytest.importorskip("pandas")
    frame = run.frame()
    assert isinstance(frame, pandas.DataFrame)
    assert sorted(frame.groupby("regime").size().items()) == [("e2e", 4 - 2), ("lw", 8), ("segprop", 6)]


def test_all_that_is_wrong_is_said_before_anything_is_trained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = copy_of_example(tmp_path / "example", {"model.args": {"classes": 4}})
    assert main(["run", str(config)]) == 2
    assert "model.build: the head gives 4 scores, the data have 10 classes" in capsys.readouterr().err
    assert main(["run", str(config), "model.args={channels: 3}"]) == 2
    assert "model.build: the network cannot take samples of shape (1, 16, 16)" in capsys.readouterr().err
    assert main(["run", str(config), "model.build=mynet:unet_encoder", "data.build=mydata:split"]) == 2
    said = capsys.readouterr().err
    assert "there is no module 'mynet' in" in said
    assert "mydata has no function 'split'; did you mean 'splits'?" in said
    (config.parent / "images" / "0007.png").write_bytes(b"no image")
    assert main(["run", str(config), "model.args={}"]) == 2
    assert "data.build: sample 5 of train cannot be read: UnidentifiedImageError" in capsys.readouterr().err
    assert not (config.parent / "run" / "summary.json").exists()


@pytest.mark.timeout(900)
def test_on_ray_killed_and_resumed_it_gives_the_same_weights(finished: Path, tmp_path: Path, ray_home: RayHome) -> None:
    """Driver and workers are in another folder than the code, and die once each."""
    config = copy_of_example(
        tmp_path / "example", {"resources": {"runner": "ray", "device": "cpu", "slots": 1, "threads": 1}}
    )
    ray_home.run_through_kills(config, driver=["driver.committed:4"], workers=["stage.step:9"])
    done = json.loads((tmp_path / "example" / "run" / "summary.json").read_text())
    assert {regime["status"] for regime in done["regimes"].values()} == {"done"}
    assert final_digests(prepare(config)) == final_digests(prepare(finished))
