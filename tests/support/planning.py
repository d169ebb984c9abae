"""Configurations and plans for the tests of the orchestrator's pure parts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from orchestrator.config.load import load
from orchestrator.config.schema import Config
from orchestrator.plan.builder import build_plan
from orchestrator.plan.graph import Plan
from workers.data.images.outline import DataOutline
from workers.models.registry import family_of

CIFAR = DataOutline(
    classes=10,
    class_names=tuple("0123456789"),
    native=(3, 32, 32),
    train_rows=50_000,
    test_rows=10_000,
    fingerprint="f" * 64,
    mean=(0.5, 0.5, 0.5),
    std=(0.25, 0.25, 0.25),
)

SMALL: dict[str, Any] = {
    "model": {"name": "resnet18", "stem": "small"},
    "data": {"name": "digits", "image_size": 16, "views": 2},
    "training": {"epochs": 4, "batch_size": 64},
}


def merged(base: Any, changes: dict[str, Any]) -> dict[str, Any]:
    """`base` with `changes`, whose keys may be dotted."""
    result: dict[str, Any] = yaml.safe_load(yaml.safe_dump(base))
    for key, value in changes.items():
        here = result
        *sections, last = key.split(".")
        for section in sections:
            here = here.setdefault(section, {})
        here[last] = value
    return result


def small_config(tmp_path: Path, changes: dict[str, Any] | None = None) -> Config:
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(merged(SMALL, changes or {}), sort_keys=False))
    return load(path)


def plan_of(config: Config, data: DataOutline = CIFAR, **options: Any) -> Plan:
    sample = (3, config.data.image_size, config.data.image_size)
    models = {name: config.regime(name).model for name in config.regimes}
    outlines = {name: family_of(model).outline(model, None, sample, data.classes) for name, model in models.items()}
    return build_plan(config, outlines, data, **options)


def small_plan(tmp_path: Path, changes: dict[str, Any] | None = None) -> Plan:
    return plan_of(small_config(tmp_path, changes))


def regime_node(plan: Plan, regime: str, stage: str) -> Any:
    """The train node of a stage."""
    found = [plan.node(node) for node in plan.regimes[regime].stages if plan.node(node).task["name"] == stage]
    assert len(found) == 1, (stage, [plan.node(node).task["name"] for node in plan.regimes[regime].stages])
    return found[0]
