"""A summary as of language models: the fake run of `fake_run` with text's metrics and as many stages as one likes."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

from fake_run import make_summary


def scores(loss: float, accuracy: float = 0.4) -> dict[str, float]:
    return {"loss": loss, "accuracy": accuracy, "perplexity": math.exp(loss)}


def make_lm_summary(folder: Path, *, stages: int = 12, epochs: int = 1, original: bool = True) -> dict[str, Any]:
    """E2E 2.10 and SegProp 2.12 (layers 19 on, LM head last), on a model that came with 2.80."""
    summary = make_summary(folder, regimes="[e2e, segprop]", epochs=epochs)
    e2e, segprop = summary["regimes"]["e2e"], summary["regimes"]["segprop"]
    summary.pop("data", None)  # the fake run has images
    summary["original"] = {"test": scores(2.8), "validation": scores(2.83)} if original else {}
    for regime, loss in ((e2e, 2.1), (segprop, 2.12)):
        regime["final"].update(metrics=scores(loss), validation=scores(loss + 0.02), rows=128)
    pattern = segprop["stages"][1]
    segprop["stages"] = [_stage(pattern, index, stages) for index in range(stages)]
    _judge(e2e["stages"][0], 2.12)
    e2e["stages"][0]["source_reason"] = "starts at the text"
    names = ["embed", *(f"layer{index}" for index in range(19 + stages))]
    counted = {"samples": 384, "sample_views": 384, "per_sample_view": 1.0}
    segprop["forwards"] = {name: dict(counted) for name in sorted(names)}
    return summary


def _stage(pattern: dict[str, Any], index: int, stages: int) -> dict[str, Any]:
    stage = copy.deepcopy(pattern)
    layer: int | str = "head" if index == stages - 1 else 19 + index
    stage.update(layer=layer, auxiliary=False, name=f"stage{index + 1}-layer{layer}")
    stage["path"] = stage["trained"] = [f"layer{number}" for number in range(20)] if index == 0 else ["layer20", "head"]
    stage["source"] = "images" if index == 0 else "snapshots"
    stage["source_reason"] = "starts at the text" if index == 0 else "saves 50.0% of the prefix's forward work"
    loss = 2.8 - 0.6 * index / stages
    _judge(stage, loss)
    stage["assembled"], stage["truncated"], stage["full"] = scores(loss), scores(loss + 3), scores(loss)
    return stage


def _judge(stage: dict[str, Any], loss: float) -> None:
    for epoch in stage["curve"]:
        epoch.pop("images_per_s", None)
        epoch.update(
            train_loss=loss, train_accuracy=None, validation_loss=loss, validation_accuracy=0.4, samples_per_s=50.0
        )
        epoch["validation"] = scores(loss)
    stage["metrics"] = {"validation_loss": loss, "validation_accuracy": 0.4}
    stage["assembled"] = scores(loss)
