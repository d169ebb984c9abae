"""Snapshots of tokens present, missing or damaged: the numbers are the same."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from lm_running import LLAMA, lm_changes
from running import Lab, checksums, digests
from shard_damage import flip, folder_of, replace, shard_files

from cache_store.snapshots.store import SnapshotStore
from workers.specs.data_results import TextDataResult

STAGE = "segprop/stage3-layer2"
READ = "segprop/snapshot layer1 train view 0"
BEFORE = "segprop/snapshot layer0 train view 0"
VALIDATION = "segprop/snapshot layer1 validation"


@pytest.fixture(scope="module")
def complete(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    """All stages and sets of a SegProp run over samples of different lengths, bf16 by autocast, nothing released."""
    folder = tmp_path_factory.mktemp("complete")
    changes = {
        **lm_changes(folder),
        "model.config": {**LLAMA, "num_hidden_layers": 4},
        "data.pack": False,
        "training.precision": "bf16",
        "training.epochs": 2,
        "training.micro_batch": 3,
        "snapshots": {"group_rows": 4, "shard_bytes": 16_000},
    }
    lab = Lab.make(folder, changes)
    lab.run_all(("data", "model", "train", "materialize"))
    assert lab.commit(STAGE).result["snapshot"]["misses"] == 0
    assert lab.snapshots(READ).spec.shards > 2
    return lab


def drop(lab: Lab, *labels: str) -> None:
    for label in labels:
        SnapshotStore(lab.storage).drop(lab.commit(label).result["set"])


def lose_a_shard(lab: Lab) -> None:
    snapshots = lab.snapshots(READ)
    shard_files(snapshots)[1].unlink()
    sorted((folder_of(snapshots) / "commits").iterdir())[1].unlink()


def lose_every_set(lab: Lab) -> None:
    drop(lab, *(node.label for node in lab.prepared.plan.sets))


def lose_the_one_for_validation(lab: Lab) -> None:
    drop(lab, VALIDATION)


def damage_it_and_the_one_before(lab: Lab) -> None:
    flip(shard_files(lab.snapshots(READ))[-1])
    for label in (READ, BEFORE):
        replace(shard_files(lab.snapshots(label))[0], b"")


def swap_with_the_one_before(lab: Lab) -> None:
    """A foreign shard: whole and of the same size, but of another boundary."""
    foreign = shard_files(lab.snapshots(BEFORE))[0]
    replace(shard_files(lab.snapshots(READ))[0], foreign.read_bytes())


def lose_the_tokens(lab: Lab) -> None:
    """What the samples themselves are, too: made again from the files of the data set."""
    result = lab.commit("data").read(TextDataResult)
    for split in ("train", "validation"):
        SnapshotStore(lab.storage).drop(result.split(split).tokens)
    drop(lab, READ)


DAMAGES: list[Callable[[Lab], None]] = [
    lose_a_shard,
    lose_every_set,
    lose_the_one_for_validation,
    damage_it_and_the_one_before,
    swap_with_the_one_before,
    lose_the_tokens,
]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__.replace("_", " "))
def test_a_language_models_stage_ends_with_the_same_bits_on_hit_and_on_miss(
    complete: Lab, tmp_path: Path, damage: Callable[[Lab], None]
) -> None:
    lab = complete.linked_copy(tmp_path)
    lab.forget(STAGE)
    damage(lab)
    commit, expected = lab.run(STAGE), complete.commit(STAGE)
    assert digests(commit) == digests(expected)
    assert commit.result["snapshot"]["misses"] > 0
    scores = [epoch["validation"] for epoch in expected.result["epochs"]]
    assert [epoch["validation"] for epoch in commit.result["epochs"]] == scores
    for label in (READ, VALIDATION):
        assert lab.snapshots(label).missing() == []
        assert checksums(lab.snapshots(label)) == checksums(complete.snapshots(label)), label


def test_recomputing_from_the_tokens_gives_the_bytes_of_rolling_forward(complete: Lab, tmp_path: Path) -> None:
    assert complete.commit(READ).result["forwards"] == {"layer1": 32}, "rolled forward"
    lab = complete.linked_copy(tmp_path)
    lose_every_set(lab)
    lab.forget(READ)
    assert lab.run(READ).result["forwards"] == {"embed": 32, "layer0": 32, "layer1": 32}
    assert checksums(lab.snapshots(READ)) == checksums(complete.snapshots(READ))


def test_tokens_that_cannot_be_made_again_are_refused_not_replaced(complete: Lab, tmp_path: Path) -> None:
    from cache_store.errors import DataError

    lab = complete.linked_copy(tmp_path)
    lab.forget(STAGE)
    lose_the_tokens(lab)
    text = Path(complete.prepared.config.data.path or "")
    whole, times = text.read_bytes(), text.stat()
    try:
        text.write_text('{"text": "another text, and only one"}\n' * 60)
        with pytest.raises(DataError, match=r"data\.path.*changed"):
            lab.run(STAGE)
    finally:
        text.write_bytes(whole)
        os.utime(text, ns=(times.st_atime_ns, times.st_mtime_ns))
