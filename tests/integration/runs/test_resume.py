"""A stage that is stopped or killed in the middle and run again ends with the same bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from running import Lab, StopAfter, digests

from cache_store.errors import Interrupted
from workers.training import clocks

#: Six steps an epoch, three epochs; a small path, so that checkpoints are small.
BASE: dict[str, Any] = {"training.epochs": 3, "data.views": 2}
STAGE = "segprop/stage1-base"

CASES: dict[str, dict[str, Any]] = {
    "fp32 with dropout": {"model.dropout": 0.5},
    # As the quickstart: fused optimizers read their state in memory order, which a file does not keep.
    "bf16, channels_last": {"training.precision": "bf16", "training.channels_last": True},
    "sgd with momentum, accumulation, channels_last": {
        "training.optimizer": {"name": "sgd", "lr": 0.02},
        "training.accumulate": 2,
        "training.channels_last": True,
        "training.schedule": {"name": "cosine", "warmup": 0.2},
    },
}


class CrashError(Exception):
    pass


def often(lab: Lab, case: str) -> Lab:
    """The same with a checkpoint after every step."""
    return Lab.make(Path(lab.store).parent, {**BASE, **CASES[case], "training.checkpoint_every_s": 1e-6})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("resume")


@pytest.fixture(autouse=True)
def _look_after_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clocks, "REPORT_EVERY_S", 0.0)


@pytest.fixture
def interrupted(folder: Path, tmp_path: Path, request: pytest.FixtureRequest) -> tuple[Lab, Lab]:
    """The lab of an uninterrupted stage, and one with the same inputs in which it has not run."""
    reference = Lab.make(folder, {**BASE, **CASES[request.param]})
    for node in reference.prepared.plan.nodes[:2]:
        reference.run(node.label)
    other = reference.linked_copy(tmp_path)
    if other.nodes.commit_of(other.node(STAGE).id):
        other.forget(STAGE)
    reference.run(STAGE)
    return reference, other


@pytest.mark.parametrize("interrupted", CASES, indirect=True)
def test_a_stage_stopped_in_mid_epoch_and_resumed_equals_the_uninterrupted_one(interrupted: tuple[Lab, Lab]) -> None:
    reference, other = interrupted
    with pytest.raises(Interrupted, match="stage1-base stopped at epoch 2, step 2"):
        other.run(STAGE, StopAfter(8))
    with pytest.raises(Interrupted, match="epoch 3, step 6"):  # after the last step, before the epoch's end
        other.run(STAGE, StopAfter(10))
    commit = other.run(STAGE)
    assert commit.result["resumed"] == 2
    assert digests(commit) == digests(reference.commit(STAGE))
    whole = reference.commit(STAGE).result
    for key in ("epoch", "train_loss", "train_accuracy", "validation_loss", "validation_accuracy", "lr"):
        assert [epoch[key] for epoch in commit.result["epochs"]] == [epoch[key] for epoch in whole["epochs"]]
    assert commit.result["steps"] == whole["steps"] == 18


@pytest.mark.parametrize("interrupted", ["bf16, channels_last"], indirect=True)
def test_a_stage_that_crashes_goes_on_from_its_last_periodic_checkpoint(interrupted: tuple[Lab, Lab]) -> None:
    reference, other = interrupted
    # The interval is no part of what is trained, nor of the node's id.
    frequent = often(other, "bf16, channels_last")
    assert frequent.node(STAGE).id == reference.node(STAGE).id
    with pytest.raises(CrashError):
        frequent.run(STAGE, StopAfter(9, CrashError))
    found = frequent.nodes.checkpoints(frequent.node(STAGE).id)
    assert [checkpoint.position for checkpoint in found] == [(8, 1, 2), (7, 1, 1)], "two are kept"
    commit = frequent.run(STAGE)
    assert commit.result["resumed"] == 1
    assert digests(commit) == digests(reference.commit(STAGE))
    assert frequent.nodes.checkpoints(frequent.node(STAGE).id) == [], "a finished stage keeps none"


@pytest.mark.parametrize("interrupted", ["fp32 with dropout"], indirect=True)
def test_a_damaged_checkpoint_is_passed_over(interrupted: tuple[Lab, Lab]) -> None:
    reference, other = interrupted
    frequent = often(other, "fp32 with dropout")
    with pytest.raises(CrashError):
        frequent.run(STAGE, StopAfter(9, CrashError))
    newest = frequent.nodes.checkpoints(frequent.node(STAGE).id)[0]
    path = Path(frequent.store) / newest.files["state.safetensors"].path
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert digests(frequent.run(STAGE)) == digests(reference.commit(STAGE))
