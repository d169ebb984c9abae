"""Families of image networks beside ResNets: trained in every regime, exported, and loaded by their library alone."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from running import summary_of, write_config

from cache_store.records.nodes import NodeStore
from cache_store.snapshots.store import SnapshotStore
from cache_store.storage.open import open_storage
from orchestrator.cli import main
from orchestrator.runs.prepare import prepare
from workers.data.images.source import ImageSource
from workers.specs.as_json import from_json
from workers.specs.data_results import ImageDataResult
from workers.specs.tasks import EvaluateTask

#: Family -> settings, and the stages of SegProp.
FAMILIES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "vit": (
        {
            "model": {"family": "vit", "patch": 4, "layers": 3, "hidden": 24, "heads": 2, "mlp": 48},
            "split": {"base": 1, "head": 1},
        },
        ["stage1-base", "stage2-layer1"],
    ),
    "vgg": (
        {
            "model": {
                "family": "vgg",
                "name": "vgg11_bn",
                "hidden": 16,
                "segments": [["stage1", "stage2", "stage3"], ["stage4", "stage5"]],
            },
            "data.image_size": 32,
        },
        ["stage1-base", "stage2-seg2"],
    ),
    "torchvision": (
        {"model": {"family": "torchvision", "name": "shufflenet_v2_x0_5", "segments": 3}, "data.image_size": 32},
        ["stage1-base", "stage2-stage2_3", "stage3-stage4_1"],
    ),
    "timm": (
        {
            "model": {
                "family": "timm",
                "name": "swin_tiny_patch4_window7_224",
                "args": {
                    "embed_dim": 12,
                    "depths": [1, 2],
                    "num_heads": [2, 2],
                    "window_size": 4,
                    "patch_size": 2,
                    "img_size": 16,
                },
            },
            "data.image_size": 16,
            "split": {"base": 2},
        },
        ["stage1-base", "stage2-layers_1_downsample", "stage3-layers_1_blocks_0", "stage4-layers_1_blocks_1"],
    ),
    "hf_image": (
        {
            "model": {
                "family": "hf_image",
                "config": {
                    "model_type": "dinov2",
                    "image_size": 16,
                    "patch_size": 4,
                    "hidden_size": 24,
                    "num_hidden_layers": 3,
                    "num_attention_heads": 2,
                    "mlp_ratio": 2,
                },
            },
            "data.image_size": 16,
            "split": {"base": 2, "head": 1},
        },
        ["stage1-base", "stage2-dinov2_encoder_layer_1"],
    ),
}


@pytest.mark.parametrize("family", list(FAMILIES))
def test_a_family_trains_in_every_regime_and_its_library_loads_what_it_gives(tmp_path: Path, family: str) -> None:
    if family == "timm":
        pytest.importorskip("timm", reason="timm is not installed (segprop[timm])")
    settings, stages = FAMILIES[family]
    config = write_config(tmp_path, {**settings, "regimes": ["e2e", "lw", "segprop"], "snapshots.mode": "always"})
    assert main(["run", str(config), "--quiet"]) == 0
    summary = summary_of(tmp_path / "run")
    assert [stage["name"] for stage in summary["regimes"]["segprop"]["stages"]] == stages
    prepared = prepare(config)
    storage = open_storage(prepared.config.store)
    for name, regime in summary["regimes"].items():
        assert regime["status"] == "done", name
        node = prepared.plan.node(prepared.plan.regimes[name].test)
        data = NodeStore(storage).commit_of(node.parents["data"])
        assert data is not None
        experiment = from_json(EvaluateTask, node.task).experiment
        images = ImageSource(experiment, data.read(ImageDataResult), SnapshotStore(storage), "test")
        network = runpy.run_path(str(tmp_path / "run" / "model" / name / "load_model.py"))["load"]()
        with torch.inference_mode():
            given = network(images.batch(np.arange(images.rows), None))
        logits = getattr(given, "logits", given)
        scored = torch.nn.functional.cross_entropy(logits, images.labels.long()).item()
        assert scored == pytest.approx(regime["final"]["metrics"]["loss"], rel=1e-5), name
    page = (tmp_path / "run" / "report.html").read_text()
    assert "perplexity" not in page
