"""The package `segprop`: its public names, how light it is, and configurations that are mappings."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import segprop
from cache_store.errors import ConfigError, UserError
from orchestrator.config.load import document_of

ROOT = Path(__file__).parents[3]


def test_its_public_names_are_these() -> None:
    assert dir(segprop) == segprop.__all__ == ["Chain", "Run", "load", "plan", "run"]
    assert all(getattr(segprop, name).__doc__ for name in segprop.__all__)
    with pytest.raises(AttributeError, match="no attribute 'Chains'; it has Chain"):
        segprop.Chains  # noqa: B018


def test_importing_it_loads_nothing_and_chain_loads_no_orchestrator() -> None:
    code = (
        "import sys, segprop\nheavy = [n for n in ('torch', 'ray', 'orchestrator', 'workers') if n in sys.modules]\n"
        "segprop.Chain\nprint(heavy, 'orchestrator' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[] False"


def test_a_mapping_is_read_as_a_file_would_be() -> None:
    document = document_of({"model": {"family": "python", "build": "a:b"}, "data": {"name": "digits"}}, ["seed=3"])
    assert (document.data["model"]["path"], document.data["seed"], document.data["run"]) == (".", 3, "run")
    with pytest.raises(ConfigError, match=r"model\.build"):
        segprop.plan({"model": {"family": "python"}, "data": {"name": "digits"}})


def test_a_plan_takes_overrides_as_sections_and_as_dotted_keys() -> None:
    config = {"model": {"name": "resnet18", "stem": "small"}, "data": {"name": "digits", "image_size": 16}}
    planned = segprop.plan(config, training={"epochs": 3, "optimizer": {"lr": 1e-5}}, **{"split.base": 2, "seed": 7})
    assert planned.stages["segprop"] == ["stage1-base", "stage2-seg3", "stage3-seg4"]
    training = planned.config["training"]
    assert (training["epochs"], training["optimizer"]["lr"], planned.config["seed"]) == (3, 1e-5, 7)


def test_what_is_no_model_is_named_with_what_there_is(tmp_path: Path) -> None:
    (tmp_path / "model" / "segprop").mkdir(parents=True)
    with pytest.raises(UserError, match=r"no model of 'segprob'; did you mean 'segprop'\?; finished there: segprop"):
        segprop.load(tmp_path, "segprob")


def test_a_chain_names_its_blocks_and_refuses_names_that_parts_cannot_have() -> None:
    from torch import nn

    chain = segprop.Chain([nn.Flatten(), nn.Linear(4, 3)], nn.Linear(3, 2))
    assert next(name for name, _ in chain.named_parameters()) == "blocks.block2.weight"
    for name in ("head", "aux", "a.b", "items"):
        with pytest.raises(ValueError, match="cannot be the name of a block"):
            segprop.Chain({name: nn.Flatten()}, nn.Linear(3, 2))
    with pytest.raises(ValueError, match="at least one block"):
        segprop.Chain([], nn.Linear(3, 2))
