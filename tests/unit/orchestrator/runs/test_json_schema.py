"""The schema for editors agrees with what the program takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator

from orchestrator.config.yaml_loader import load_document
from orchestrator.runs.json_schema import json_schema

CONFIGS = sorted((Path(__file__).parents[4] / "configs").glob("*.yaml"))
IMAGES: dict[str, Any] = {"model": {"name": "resnet18"}, "data": {"name": "digits"}}
TEXT: dict[str, Any] = {"model": {"family": "causal_lm", "path": "m"}, "data": {"name": "text", "path": "t"}}


@pytest.fixture(scope="module")
def validator() -> Draft202012Validator:
    schema = json_schema()
    Draft202012Validator.check_schema(schema)
    return Draft202012Validator(schema)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_configuration_here_is_allowed(path: Path, validator: Draft202012Validator) -> None:
    assert [error.message for error in validator.iter_errors(load_document(path).data)] == []


@pytest.mark.parametrize(
    "right",
    [
        {"snapshots": {"budget": "20GB"}},
        {"regimes": ["e2e", "lw"]},
        {"regimes": {"long": {"kind": "segprop", "training": {"epochs": 3}}, "e2e": None}},
        {"resources": {"interruptions_every": "12h", "runner": "local"}},
    ],
)
def test_what_may_be_written_in_several_ways_is_allowed(right: dict[str, Any], validator: Draft202012Validator) -> None:
    assert validator.is_valid({**IMAGES, **right})


@pytest.mark.parametrize(
    "wrong",
    [
        {**IMAGES, "training": {"epoch": 3}},
        {**IMAGES, "training": {"epochs": "three"}},
        {**IMAGES, "data": {"name": "digits", "sequence_length": 8}},
        {**TEXT, "data": {"name": "text", "image_size": 8}},
        {**TEXT, "model": {"family": "causal_lm", "stem": "small"}},
        {**IMAGES, "regimes": ["e2f"]},
        {**IMAGES, "regimes": {"x": {"kind": "e2e", "training": {"epoch": 1}}}},
        {**IMAGES, "resources": {"runner": "nobody"}},
        {"model": {"name": "resnet18"}},
    ],
    ids=lambda wrong: yaml.safe_dump(wrong, default_flow_style=True)[-60:],
)
def test_mistakes_are_marked(wrong: dict[str, Any], validator: Draft202012Validator) -> None:
    assert not validator.is_valid(wrong)


def test_keys_say_what_they_mean() -> None:
    definitions = json_schema()["$defs"]
    assert "gradient norm" in definitions["resnet.TrainSpec"]["properties"]["clip"]["description"]
    assert "20GB" in definitions["resnet.SnapshotConfig"]["properties"]["budget"]["description"]
