"""CIFAR-10 as users have it: Parquet from the hub, 60,000 JPEG images."""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from cache_store.snapshots.store import SnapshotStore
from cache_store.storage.open import open_storage
from workers.data.images.inspect import inspect
from workers.data.images.prepare import prepare
from workers.data.images.source import ImageSource
from workers.specs.experiment import Experiment, ImageSpec, ResNetSpec

SHARED = Path(os.environ.get("SEGPROP_SHARED") or Path(__file__).resolve().parents[4] / "shared")
CIFAR10 = SHARED / "data" / "cifar10"

pytestmark = pytest.mark.skipif(
    not CIFAR10.is_dir(),
    reason=f"no CIFAR-10 Parquet files in {CIFAR10}: set SEGPROP_SHARED to the folder that holds data/",
)


def test_real_cifar10_is_described_decoded_once_and_augmented(tmp_path: Path) -> None:
    data = ImageSpec(name="cifar10", path=str(CIFAR10), image_size=32, views=2, train_limit=2000)
    outline = inspect(data)
    assert (outline.train_rows, outline.test_rows, outline.classes) == (50_000, 10_000, 10)

    snapshots = SnapshotStore(open_storage(str(tmp_path / "store")))
    result = prepare(data, snapshots)
    started = time.perf_counter()
    assert prepare(data, snapshots) == result
    assert time.perf_counter() - started < 2

    train = snapshots.load(result.train)
    labels = np.concatenate([train.shard(i)[1] for i in range(train.spec.shards)])
    assert np.bincount(labels).tolist() == [5000] * 10
    pixels = train.shard(0)[0] / 255
    assert pixels.mean(axis=(0, 2, 3)) == pytest.approx(outline.mean, abs=0.01)

    experiment = Experiment(model=ResNetSpec(name="resnet18", stem="small"), data=data, classes=10, seed=0)
    splits = {name: ImageSource(experiment, result, snapshots, name) for name in ("train", "validation", "test")}
    assert {name: source.rows for name, source in splits.items()} == {
        "train": 2000,
        "validation": 5000,
        "test": 10_000,
    }
    rows = torch.arange(512)
    view = splits["train"].batch(rows, 0)
    assert view.shape == (512, 3, 32, 32)
    assert torch.isfinite(view).all()
    assert torch.equal(splits["train"].batch(rows[100:200], 0), view[100:200])
    assert not torch.equal(splits["train"].batch(rows, 1), view)
    # Normalised: the evaluation images of the whole test split have about zero mean and unit deviation.
    test = splits["test"].batch(torch.arange(10_000), None)
    assert test.mean().abs() < 0.1
    assert abs(test.std().item() - 1.2) < 0.15
