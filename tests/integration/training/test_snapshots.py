"""Snapshots present, missing or damaged: the numbers are the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from running import Lab, checksums, digests
from safetensors.torch import save_file
from shard_damage import flip, folder_of, replace, shard_files

from cache_store.errors import ConfigError, TrainingDiverged
from cache_store.snapshots.store import SnapshotStore
from workers.models.resnet.parts import initial_state
from workers.specs.experiment import ResNetSpec

STAGE = "segprop/stage3-seg3"
READ = "segprop/snapshot seg2 train view 1"
BEFORE = "segprop/snapshot seg1 train view 1"


@pytest.fixture(scope="module")
def complete(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    """All stages and sets of a SegProp run as the quickstart's, two views, nothing released."""
    lab = Lab.make(
        tmp_path_factory.mktemp("complete"),
        {"data.views": 2, "training.precision": "bf16", "training.channels_last": True},
    )
    lab.run_all(("data", "model", "train", "materialize"))
    assert lab.commit(STAGE).result["snapshot"]["misses"] == 0
    return lab


def drop(lab: Lab, label: str) -> None:
    SnapshotStore(lab.storage).drop(lab.commit(label).result["set"])


def lose_a_shard(lab: Lab) -> None:
    snapshots = lab.snapshots(READ)
    shard_files(snapshots)[1].unlink()
    sorted((folder_of(snapshots) / "commits").iterdir())[1].unlink()


def lose_the_set(lab: Lab) -> None:
    drop(lab, READ)


def lose_every_set(lab: Lab) -> None:
    for node in lab.prepared.plan.sets:
        drop(lab, node.label)


def flip_a_byte(lab: Lab) -> None:
    flip(shard_files(lab.snapshots(READ))[-1])


def truncate(lab: Lab) -> None:
    file = shard_files(lab.snapshots(READ))[0]
    replace(file, file.read_bytes()[:-1000])


def swap_with_another_set(lab: Lab) -> None:
    """A foreign shard: whole, but of another view."""
    foreign = shard_files(lab.snapshots("segprop/snapshot seg2 train view 0"))[0]
    replace(shard_files(lab.snapshots(READ))[0], foreign.read_bytes())


def damage_it_and_the_one_before(lab: Lab) -> None:
    flip_a_byte(lab)
    for label in (READ, BEFORE):
        file = shard_files(lab.snapshots(label))[0]
        replace(file, b"")


DAMAGES: list[Callable[[Lab], None]] = [
    lose_a_shard,
    lose_the_set,
    lose_every_set,
    flip_a_byte,
    truncate,
    swap_with_another_set,
    damage_it_and_the_one_before,
]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__.replace("_", " "))
def test_a_stage_gives_the_same_weights_on_hit_and_on_miss(
    complete: Lab, tmp_path: Path, damage: Callable[[Lab], None]
) -> None:
    lab = complete.linked_copy(tmp_path)
    lab.forget(STAGE)
    damage(lab)
    commit = lab.run(STAGE)
    assert digests(commit) == digests(complete.commit(STAGE))
    assert commit.result["snapshot"]["misses"] > 0
    losses = [epoch["validation_loss"] for epoch in complete.commit(STAGE).result["epochs"]]
    assert [epoch["validation_loss"] for epoch in commit.result["epochs"]] == losses
    # What was missing was put back, the same bytes as before.
    assert lab.snapshots(READ).missing() == []
    assert checksums(lab.snapshots(READ)) == checksums(complete.snapshots(READ))
    quarantined = list((folder_of(lab.snapshots(READ)) / "quarantine").glob("*.json"))
    assert bool(quarantined) == (damage not in (lose_a_shard, lose_the_set, lose_every_set))


def test_recomputing_from_the_images_gives_the_bytes_of_rolling_forward(complete: Lab, tmp_path: Path) -> None:
    label = "segprop/snapshot seg3 train view 1"
    assert complete.commit(label).result["forwards"] == {"seg3": 96}, "rolled forward"
    lab = complete.linked_copy(tmp_path)
    lose_every_set(lab)
    lab.forget(label)
    commit = lab.run(label)
    assert commit.result["forwards"] == {"seg1": 96, "seg2": 96, "seg3": 96}
    assert commit.result["set"] == complete.commit(label).result["set"]
    assert checksums(lab.snapshots(label)) == checksums(complete.snapshots(label))
    assert len({complete.snapshots(f"segprop/snapshot seg{i} train view 1").spec.shard_rows for i in (1, 2, 3)}) == 3


def test_a_released_set_is_made_again_for_whoever_needs_it(complete: Lab, tmp_path: Path) -> None:
    lab = complete.linked_copy(tmp_path)
    drop(lab, READ)
    commit = lab.run(READ)
    assert commit == complete.commit(READ), "the first commit stays the one that counts"
    assert checksums(lab.snapshots(READ)) == checksums(complete.snapshots(READ))


def scaled_base(folder: Path, scale: float, dtype: str, encoding: str = "plain") -> Lab:
    """A base taken as it comes, whose first segment gives values about `scale` times the usual ones."""
    folder.mkdir(parents=True, exist_ok=True)
    state = initial_state(ResNetSpec(name="resnet18", stem="small", hidden=32), 10, 0)
    state["layer1.1.bn2.weight"].fill_(scale)
    save_file(state, folder / "weights.safetensors")
    changes = {
        "model.weights": str(folder / "weights.safetensors"),
        "split": {"train_base": False, "head": 1},
        "snapshots": {"mode": "always", "dtype": dtype, "encoding": encoding},
    }
    return Lab.make(folder, changes)


@pytest.mark.parametrize("encoding", ["plain", "lossless", "int8"])
def test_values_that_float16_does_not_hold_are_refused_and_not_stored(encoding: str, tmp_path: Path) -> None:
    label = "segprop/snapshot seg1 validation"
    lab = scaled_base(tmp_path, 1e5, "float16", encoding)
    with pytest.raises(
        ConfigError, match=r"float16 holds values up to 65,504, but behind seg1 there are some"
    ) as error:
        lab.run(label)
    assert 65_504 < error.value.details["largest"] < 1e7
    assert "bfloat16" in error.value.message
    assert lab.nodes.commit_of(lab.node(label).id) is None
    (found,) = [info for info in SnapshotStore(lab.storage).list() if info.key.get("kind") == "boundary"]
    assert found.shards_present == 0

    wider = scaled_base(tmp_path, 1e5, "bfloat16", encoding)
    wider.run(label)
    assert wider.snapshots(label).missing() == []


def test_activations_that_are_not_finite_are_not_stored(tmp_path: Path) -> None:
    label = "segprop/snapshot seg1 validation"
    lab = scaled_base(tmp_path, float("inf"), "float32")
    with pytest.raises(TrainingDiverged, match="behind seg1 are not finite, computed in fp32"):
        lab.run(label)
    assert lab.nodes.commit_of(lab.node(label).id) is None
