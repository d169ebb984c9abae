"""A stage trains to the same bits wherever states, masters and gradients lie, killed and resumed or not."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path
from typing import Any

import pytest
from lm_running import lm_changes
from running import DEVICE, Lab, StopAfter, digests

from cache_store.errors import ConfigError, OutOfHostMemory, StorageFull, UserError
from workers.training import clocks
from workers.training.tiers import opening

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


def tiers(tmp_path: Path, **memory: str) -> dict[str, Any]:
    """A section `memory`, with a folder where it needs one."""
    return {"memory": {**memory, **({"disk": str(tmp_path / "scratch")} if "disk" in memory.values() else {})}}


@pytest.mark.parametrize("tier", ["host", "disk"])
@pytest.mark.parametrize("case", CASES)
def test_states_beside_the_device_train_to_the_same_bits(folder: Path, tmp_path: Path, case: str, tier: str) -> None:
    plain, tiered = lab(folder, case), lab(tmp_path, case, tiers(tmp_path, optimizer=tier))
    assert plain.node(STAGE).id != tiered.node(STAGE).id
    assert digests(plain.run(STAGE)) == digests(tiered.run(STAGE))
    assert tier == "host" or list((tmp_path / "scratch").iterdir()) == []


MASTERED = {"model.master": "bfloat16", "training.precision": "bf16", "training.micro_batch": 3, "training.clip": 0.5}
WITH_MASTERS = [("device", "device"), ("host", "host"), ("host", "disk"), ("disk", "host"), ("disk", "disk")]


def test_masters_train_to_the_same_bits_wherever_they_lie(folder: Path, tmp_path: Path) -> None:
    found = []
    for optimizer, masters in WITH_MASTERS:
        section = tiers(tmp_path, optimizer=optimizer, masters=masters)
        tiered = lab(tmp_path / f"{optimizer}-{masters}", "adamw", MASTERED, section)
        found.append(digests(tiered.run(STAGE)))
    assert all(each == found[0] for each in found)
    assert found[0] != digests(lab(folder, "adamw", MASTERED).run(STAGE))


@pytest.mark.parametrize(("optimizer", "masters"), [("host", "none"), ("disk", "none"), *WITH_MASTERS])
def test_a_killed_stage_goes_on_with_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optimizer: str, masters: str
) -> None:
    monkeypatch.setattr(clocks, "REPORT_EVERY_S", 0.0)
    section = tiers(tmp_path, optimizer=optimizer, masters=masters)
    whole = lab(tmp_path / "whole", "adamw", MASTERED, section).run(STAGE)
    stopped = lab(tmp_path / "stopped", "adamw", MASTERED, section, {"training.checkpoint_every_s": 1e-6})
    stopped.prepare(STAGE)
    with pytest.raises(RuntimeError, match="crashed"):
        stopped.run(STAGE, StopAfter(3, RuntimeError))
    resumed = stopped.run(STAGE)
    assert resumed.result["resumed"] == 1
    assert digests(resumed) == digests(whole)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "disk without a folder": (
        {"memory": {"optimizer": "disk"}},
        r"memory\.disk: null: optimizer or masters are on",
    ),
    "masters of float32": ({"memory": {"masters": "device"}}, r"memory\.masters: device: weights in float32 are their"),
    "masters away from the states": (
        {**MASTERED, "memory": {"masters": "host"}},
        r"memory\.masters: host: masters change where .* on the device .* allowed there: none, device",
    ),
    "masters of adapters": (
        {**MASTERED, "training.lora": {"rank": 2}, "memory": {"masters": "device"}},
        r"memory\.masters: device: low-rank adapters are in float32",
    ),
    "masters and errors": (
        {**MASTERED, "training.optimizer": {"rounding": "compensated"}, "memory": {"masters": "device"}},
        r"memory\.masters: device: nothing is rounded",
    ),
    "8 bits on disk": (
        {"training.optimizer": {"name": "adamw8bit"}, "memory": {"optimizer": "disk", "disk": "here"}},
        r"memory\.optimizer: disk: not with adamw8bit",
    ),
    "4 bits on the host": (
        {"training.optimizer": {"name": "adamw4bit"}, "memory": {"optimizer": "host"}},
        r"memory\.optimizer: host: not with adamw4bit",
    ),
    "4 bits in another order": (
        {"training.optimizer": {"name": "adamw4bit"}, "training.channels_last": True},
        r"training\.channels_last: true: not with adamw4bit",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_makes_no_sense_is_refused(folder: Path, case: str) -> None:
    changes, message = REFUSED[case]
    with pytest.raises(ConfigError, match=message):
        lab(folder, "adamw", changes)


def test_too_little_disk_or_memory_is_said_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = lab(tmp_path, "adamw", tiers(tmp_path, optimizer="disk"))
    disk.prepare(STAGE)
    shutil.rmtree(tmp_path / "scratch")  # of the stage before
    (tmp_path / "scratch").write_text("a file where the folder should be")
    with pytest.raises(UserError, match=r"memory\.disk: .*scratch: cannot be written"):
        disk.run(STAGE)
    (tmp_path / "scratch").unlink()

    def full(file: Any, size: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(opening, "allocate", full)
    with pytest.raises(StorageFull, match=r"memory\.disk: .* the updates of this stage need 0\.00 GB, .* GB are free"):
        disk.run(STAGE)
    monkeypatch.setattr(opening, "available_bytes", lambda: 1000)
    with pytest.raises(OutOfHostMemory, match=r"need 1\.00 GB of host memory, 0\.00 GB are free; nothing was trained"):
        opening.check_host(10**9)


def test_a_gang_is_refused(folder: Path) -> None:
    gang = {"resources": {"runner": "ray", "device": "cpu", "gang": {"size": 2}}}
    with pytest.raises(ConfigError, match=r"memory\.optimizer: host: not in a gang"):
        lab(folder, "adamw", HOST, gang)


def test_a_stage_may_have_its_own(folder: Path) -> None:
    own = lab(folder, "adamw", {"regimes": {"segprop": {"stages": {"segments": HOST}}}})
    found = {node.label: node.task.get("memory") for node in own.prepared.plan.nodes if node.kind == "train"}
    assert found["segprop/stage1-base"] is None
    assert found[STAGE]["optimizer"] == "host"
