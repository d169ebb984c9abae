"""A stage trains to the same bits wherever its optimizer's state lies, killed and resumed or not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from lm_running import lm_changes
from running import DEVICE, Lab, StopAfter, digests

from cache_store.errors import ConfigError
from workers.training import clocks

pytestmark = pytest.mark.skipif(DEVICE.type != "cpu", reason="a GPU's own updates round differently (tests/cuda)")

STAGE = "segprop/stage2-layer1"
HOST = {"memory": {"optimizer": "host"}}
CASES: dict[str, dict[str, Any]] = {
    "adamw": {},
    "accumulated and clipped": {"training.micro_batch": 3, "training.clip": 0.5},
    "sgd": {"training.optimizer": {"name": "sgd", "lr": 1e-2}},
    "bfloat16, stochastic": {"model.master": "bfloat16", "training.precision": "bf16"},
    "bfloat16, compensated, low-rank": {
        "model.master": "bfloat16",
        "training.precision": "bf16",
        "training.optimizer": {"lr": 1e-2, "rounding": "compensated"},
        "training.lora": {"rank": 2, "alpha": 8.0},
    },
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tiers")


def lab(folder: Path, case: str, *more: dict[str, Any]) -> Lab:
    changes = {**lm_changes(folder), "regimes": ["segprop"], "training.head_optimizer": "carry", **CASES[case]}
    for each in more:
        changes |= each
    return Lab.make(folder, changes)


@pytest.mark.parametrize("case", CASES)
def test_states_on_the_host_train_to_the_same_bits(folder: Path, case: str) -> None:
    plain, tiered = lab(folder, case), lab(folder, case, HOST)
    assert plain.node(STAGE).id != tiered.node(STAGE).id
    assert digests(plain.run(STAGE)) == digests(tiered.run(STAGE))


def test_a_stage_with_states_on_the_host_goes_on_with_the_same_bits(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clocks, "REPORT_EVERY_S", 0.0)
    whole = lab(folder, "accumulated and clipped", HOST).run(STAGE)
    stopped = lab(tmp_path, "accumulated and clipped", HOST, {"training.checkpoint_every_s": 1e-6})
    stopped.prepare(STAGE)
    with pytest.raises(RuntimeError, match="crashed"):
        stopped.run(STAGE, StopAfter(3, RuntimeError))
    resumed = stopped.run(STAGE)
    assert resumed.result["resumed"] == 1
    assert digests(resumed) == digests(whole)


def test_a_gang_is_refused(folder: Path) -> None:
    gang = {"resources": {"runner": "ray", "device": "cpu", "gang": {"size": 2}}}
    with pytest.raises(ConfigError, match=r"memory\.optimizer: host: not in a gang"):
        lab(folder, "adamw", HOST, gang)


def test_a_stage_may_have_its_own(folder: Path) -> None:
    own = lab(folder, "adamw", {"regimes": {"segprop": {"stages": {"segments": HOST}}}})
    found = {node.label: node.task.get("memory") for node in own.prepared.plan.nodes if node.kind == "train"}
    assert found["segprop/stage1-base"] is None
    assert found[STAGE] == {"optimizer": "host"}
