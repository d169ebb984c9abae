"""A model family from another package: planned, trained in every regime, exported, without touching this repository."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from installed_family import MLP, install_mlp, python
from planning import merged

#: Score an export by its own weights, on the test split that the run was scored on.
SCORE = """
import sys, torch
from pathlib import Path
from cache_store.records.nodes import NodeStore
from cache_store.snapshots.store import SnapshotStore
from cache_store.storage.open import open_storage
from orchestrator.runs.prepare import prepare
from safetensors.torch import load_file
from segprop_mlp.network import MLPParts
from workers.data.images.source import ImageSource
from workers.specs.as_json import from_json
from workers.specs.data_results import ImageDataResult
from workers.specs.tasks import EvaluateTask

prepared, regime = prepare(sys.argv[1]), sys.argv[2]
node = prepared.plan.node(prepared.plan.regimes[regime].test)
experiment = from_json(EvaluateTask, node.task).experiment
storage = open_storage(prepared.config.store)
data = NodeStore(storage).commit_of(node.parents["data"])
source = ImageSource(experiment, data.read(ImageDataResult), SnapshotStore(storage), "test")
state = load_file(prepared.run_dir / "model" / regime / "model.safetensors")
parts = MLPParts(experiment.model.widths, (3, 8, 8), experiment.classes)
value = (source.batch(torch.arange(source.rows), None),)
for name in parts.names():
    part = parts.build(name, torch.device("cpu"))
    part.load_state_dict({key: state.pop(key) for key in parts.state_names(name)}, strict=True)
    value = part(value)
assert not state
print((value.argmax(dim=1) == source.labels).double().mean().item())
"""


def write(folder: Path, changes: dict[str, Any] | None = None) -> Path:
    path = folder / "mlp.yaml"
    path.write_text(yaml.safe_dump(merged({**MLP, "run_dir": str(folder / "run")}, changes or {})))
    return path


def test_a_family_of_another_package_runs_in_every_regime_and_is_exported(tmp_path: Path) -> None:
    site, config = install_mlp(tmp_path / "site"), write(tmp_path)
    done = python(site, "-m", "orchestrator.run", str(config))
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert {name: regime["status"] for name, regime in summary["regimes"].items()} == dict.fromkeys(
        ("e2e", "lw", "segprop"), "done"
    )
    # An adapter bridges the blocks between a segment and the head; all three blocks are stages.
    assert [stage["name"] for stage in summary["regimes"]["segprop"]["stages"]] == [
        "stage1-base",
        "stage2-block2",
        "stage3-block3",
    ]
    for name, regime in summary["regimes"].items():
        accuracy = regime["final"]["metrics"]["accuracy"]
        assert accuracy > 0.5, name
        scored = python(site, "-c", SCORE, str(config), name)
        assert float(scored.stdout) == pytest.approx(accuracy), scored.stderr
        facts = json.loads((tmp_path / "run" / "model" / name / "model.json").read_text())
        assert (facts["model"]["family"], facts["class_names"]) == ("mlp", list("0123456789"))
    again = python(site, "-m", "orchestrator.run", str(config))
    assert again.returncode == 0, again.stderr
    nodes = json.loads((tmp_path / "run" / "summary.json").read_text())["nodes"]
    assert nodes["reused"] == nodes["total"] > 10


def test_a_plan_of_such_a_family_shows_what_its_stages_take(tmp_path: Path) -> None:
    done = python(install_mlp(tmp_path / "site"), "-m", "orchestrator.cli", "plan", str(write(tmp_path)))
    assert done.returncode == 0, done.stderr
    assert "an MLP of 32 + 24 + 16 on digits: 512 + 64 + 128 images, 8x8, views 1" in done.stdout
    # 192 inputs, 32 + 24 + 16 features, 10 classes: all weights and biases of the whole network.
    assert "7.54 k" in done.stdout


def test_all_problems_with_such_a_model_are_found_at_once(tmp_path: Path) -> None:
    changes = {
        "model.width": 3,
        "model.widths": [32, 0, 16],
        "training.lora": {"rank": 2},
        "split.base": 0,
        "regimes": {"segprop": {"head_convs": 2}, "lw": {"variant": "mapped"}},
    }
    done = python(install_mlp(tmp_path / "site"), "-m", "orchestrator.cli", "plan", str(write(tmp_path, changes)))
    assert done.returncode == 2
    for expected in (
        "model.width: unknown key; did you mean widths?",
        "model.widths[1]: 0: must be greater than or equal to 1",
        "training.lora: is for language models",
        "split.base: 0: must be at least 1 block of an MLP",
        "regimes.segprop.head_convs: is for ResNets and VGGs",
        "regimes.lw.variant: is for ResNets and VGGs",
    ):
        assert expected in done.stderr


def test_weights_depend_on_the_size_of_the_images_they_are_for(tmp_path: Path) -> None:
    """Of ResNets they do not: there, one node of initial weights serves all sizes."""
    site = install_mlp(tmp_path / "site")
    nodes = []
    for size in (8, 16):
        done = python(site, "-m", "orchestrator.cli", "plan", str(write(tmp_path)), f"data.image_size={size}", "--json")
        plan = json.loads(done.stdout)["plan"]
        nodes += [node for node in plan["nodes"] if node["kind"] == "model"]
    assert [node["task"]["sample"] for node in nodes] == [[3, 8, 8], [3, 16, 16]]
    assert nodes[0]["id"] != nodes[1]["id"]
