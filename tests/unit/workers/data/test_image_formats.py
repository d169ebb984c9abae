"""The table of image formats: a format is a row, which everything else goes through."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args, get_type_hints

import numpy as np
import pytest
import torch
from npz_format import Npz

from cache_store.errors import DataError
from cache_store.snapshots.store import SnapshotStore
from cache_store.storage.open import open_storage
from workers.data.images.formats.table import IMAGE_FORMATS
from workers.data.images.inspect import inspect
from workers.data.images.prepare import prepare
from workers.data.images.source import ImageSource
from workers.specs.experiment import Experiment, ImageSpec, ResNetSpec


@pytest.fixture
def arrays(tmp_path: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    draw = np.random.default_rng(0)
    made = {}
    for split, rows in (("train", 50), ("test", 9)):
        images = draw.integers(0, 256, (rows, 3, 12, 12), dtype=np.uint8)
        labels = draw.integers(0, 4, rows)
        np.savez(tmp_path / f"{split}.npz", images=images, labels=labels)
        made[split] = (images, labels)
    return made


def spec_of(folder: Path, **changes: Any) -> ImageSpec:
    name: Any = "npz"
    return ImageSpec(name=name, path=str(folder), image_size=12, resize=12, augment="none", validation=10, **changes)


def test_every_name_a_configuration_takes_has_a_row() -> None:
    assert get_args(get_type_hints(ImageSpec)["name"]) == tuple(IMAGE_FORMATS)


def test_a_set_is_prepared_and_read_in_a_format_that_was_only_entered_as_a_row(
    tmp_path: Path, arrays: dict[str, tuple[np.ndarray, np.ndarray]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(IMAGE_FORMATS, "npz", Npz())
    data = spec_of(tmp_path)
    outline = inspect(data)
    assert (outline.native, outline.train_rows, outline.test_rows, outline.classes) == ((3, 12, 12), 50, 9, 4)
    snapshots = SnapshotStore(open_storage(str(tmp_path / "store")))
    result = prepare(data, snapshots, fingerprint=outline.fingerprint)
    assert snapshots.load(result.train).spec.key["decoder"] == {"format": "npz", "version": 1}
    for split, (images, labels) in arrays.items():
        stored = snapshots.load({"train": result.train, "test": result.test}[split]).shard(0)
        assert (stored[0] == images).all()
        assert (stored[1] == labels).all()
    experiment = Experiment(model=ResNetSpec(name="resnet18", stem="small"), data=data, classes=4, seed=3)
    source = ImageSource(experiment, result, snapshots, "test")
    expected = (torch.from_numpy(arrays["test"][0][:5]) / 255.0 - 0.5) / 0.25
    assert torch.allclose(source.batch(np.arange(5), None), expected, atol=1e-5)


def test_what_it_refuses_reaches_the_user_with_what_it_allows(
    tmp_path: Path, arrays: dict[str, tuple[np.ndarray, np.ndarray]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(IMAGE_FORMATS, "npz", Npz())
    labels = arrays["train"][1].copy()
    labels[7] = 4
    np.savez(tmp_path / "train.npz", images=arrays["train"][0], labels=labels)
    with pytest.raises(DataError, match=r"row 7 of .*train\.npz: the label is 4; allowed: 0 to 3"):
        prepare(spec_of(tmp_path), SnapshotStore(open_storage("memory://npz-labels")))
    (tmp_path / "test.npz").unlink()
    with pytest.raises(DataError, match=r"test\.npz; allowed: a folder with train\.npz and test\.npz"):
        inspect(spec_of(tmp_path))
