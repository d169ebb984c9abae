from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from data_makers import parquet_set

from cache_store.errors import DataError
from cache_store.snapshots.store import SnapshotStore
from cache_store.storage.open import open_storage
from workers.data import splits
from workers.data.images import prepare as prepare_module
from workers.data.images import source as module
from workers.data.images.prepare import prepare
from workers.data.images.source import ImageSource
from workers.specs.data_results import ImageDataResult
from workers.specs.experiment import Experiment, ImageSpec, ResNetSpec

DIGITS = ImageSpec(name="digits", image_size=16, flip=False, views=2)


def experiment(data: ImageSpec, seed: int = 5) -> Experiment:
    return Experiment(model=ResNetSpec(name="resnet18"), data=data, classes=10, seed=seed)


@pytest.fixture
def snapshots(tmp_path: Path) -> SnapshotStore:
    return SnapshotStore(open_storage(str(tmp_path / "store")))


@pytest.fixture
def result(snapshots: SnapshotStore) -> ImageDataResult:
    return prepare(DIGITS, snapshots)


def test_a_batch_is_normalised_float32_of_the_configured_size(
    snapshots: SnapshotStore, result: ImageDataResult
) -> None:
    source = ImageSource(experiment(DIGITS), result, snapshots, "train")
    batch = source.batch(torch.arange(source.rows), None)
    assert batch.shape == (source.rows, 3, 16, 16)
    assert batch.dtype == torch.float32
    assert batch.is_contiguous()
    assert source.classes == 10
    assert source.rows == len(source.labels) == 1437 - 144
    # The crop drops dark borders, so the mean of what is left lies above that of whole images.
    assert -0.1 < batch.mean().item() < 0.3
    assert 0.8 < batch.std().item() < 1.2


def test_labels_belong_to_the_rows_of_the_split(snapshots: SnapshotStore, result: ImageDataResult) -> None:
    _, labels = snapshots.load(result.train).shard(0)
    chosen = splits.rows(DIGITS, 5, 1437, 360)
    for split in ("train", "validation"):
        source = ImageSource(experiment(DIGITS), result, snapshots, split)
        assert (source.labels.numpy() == labels[chosen[split]]).all()


def test_rows_may_be_numpy_or_torch_in_any_order_and_twice(snapshots: SnapshotStore, result: ImageDataResult) -> None:
    source = ImageSource(experiment(DIGITS), result, snapshots, "train")
    rows = np.array([9, 2, 9, 1200])
    assert torch.equal(source.batch(rows, 1), source.batch(torch.from_numpy(rows), 1))
    assert torch.equal(source.batch(rows, 1)[0], source.batch(rows, 1)[2])
    assert source.batch(rows[:0], 1).shape == (0, 3, 16, 16)
    for outside in (-1, source.rows):
        with pytest.raises(IndexError, match="rows"):
            source.batch(np.array([outside]), None)


def test_a_change_of_the_split_changes_no_view(snapshots: SnapshotStore, result: ImageDataResult) -> None:
    sources = {}
    for validation in (0.1, 0.3):
        data = replace(DIGITS, validation=validation)
        sources[validation] = (
            ImageSource(experiment(data), result, snapshots, "train"),
            splits.rows(data, 5, 1437, 360)["train"],
        )
    common = np.intersect1d(sources[0.1][1], sources[0.3][1])[:40]
    views = [source.batch(np.searchsorted(samples, common), 1) for source, samples in sources.values()]
    assert torch.equal(views[0], views[1])


def test_views_and_seeds_differ_and_the_evaluation_transform_does_not(
    snapshots: SnapshotStore, result: ImageDataResult
) -> None:
    source = ImageSource(experiment(DIGITS), result, snapshots, "test")
    other = ImageSource(experiment(DIGITS, seed=6), result, snapshots, "test")
    rows = np.arange(64)
    assert not torch.equal(source.batch(rows, 0), source.batch(rows, 1))
    assert not torch.equal(source.batch(rows, 0), other.batch(rows, 0))
    assert torch.equal(source.batch(rows, None), other.batch(rows, None))


def test_mapped_and_held_sets_give_the_same_batches(
    tmp_path: Path, snapshots: SnapshotStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare_module, "SHARD_BYTES", 9 * (3 * 32 * 32 + 8))
    parquet_set(tmp_path / "data")
    data = ImageSpec(name="cifar10", path=str(tmp_path), image_size=16, validation=4)
    result = prepare(data, snapshots)
    held = ImageSource(experiment(data), result, snapshots, "train")
    mapped = ImageSource(experiment(data), result, snapshots, "train", cache_bytes=0)
    rows = np.random.default_rng(0).permutation(held.rows)
    assert torch.equal(held.batch(rows, 3), mapped.batch(rows, 3))
    assert torch.equal(held.labels, mapped.labels)


def test_a_small_set_is_held_once_in_a_process_within_the_limit(
    snapshots: SnapshotStore, result: ImageDataResult
) -> None:
    module._cache.clear()
    first = ImageSource(experiment(DIGITS), result, snapshots, "train")
    second = ImageSource(experiment(DIGITS), result, snapshots, "validation")
    first.batch(np.arange(2), 0), second.batch(np.arange(2), None)
    assert first._set._memory is second._set._memory
    bytes_of_train = 1437 * 3 * 64
    ImageSource(experiment(DIGITS), result, snapshots, "test", cache_bytes=bytes_of_train).batch(np.arange(2), None)
    assert len(module._cache) == 1


def test_a_source_that_is_asked_for_labels_alone_holds_no_images(
    snapshots: SnapshotStore, result: ImageDataResult
) -> None:
    module._cache.clear()
    source = ImageSource(experiment(DIGITS), result, snapshots, "train")
    assert len(source.labels) == source.rows
    assert not module._cache


@pytest.mark.parametrize("damage", ["corrupt", "missing", "dropped"])
def test_damaged_and_missing_shards_are_decoded_again(
    tmp_path: Path, snapshots: SnapshotStore, result: ImageDataResult, damage: str
) -> None:
    whole = ImageSource(experiment(DIGITS), result, snapshots, "test").batch(np.arange(50), 0)
    module._cache.clear()
    root = tmp_path / "store" / "sets" / result.test
    if damage == "corrupt":
        shard = next((root / "shards").iterdir())
        shard.chmod(0o644)
        content = bytearray(shard.read_bytes())
        content[len(content) // 2] ^= 1
        shard.write_bytes(content)
    elif damage == "missing":
        next((root / "commits").iterdir()).unlink()
    else:
        snapshots.drop(result.test)
    source = ImageSource(experiment(DIGITS), result, snapshots, "test")
    assert torch.equal(source.batch(np.arange(50), 0), whole)


def test_a_lost_shard_whose_source_has_changed_is_a_data_error(tmp_path: Path, snapshots: SnapshotStore) -> None:
    parquet_set(tmp_path / "data")
    data = ImageSpec(name="cifar10", path=str(tmp_path), image_size=16, validation=4)
    result = prepare(data, snapshots)
    snapshots.drop(result.train)
    parquet_set(tmp_path / "data", train=39)
    with pytest.raises(DataError, match="have changed since they were decoded"):
        ImageSource(experiment(data), result, snapshots, "train")
