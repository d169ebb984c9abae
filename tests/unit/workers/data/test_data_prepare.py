from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_makers import digit_images, encode, folder_set, parquet_set, pickle_set, write_parquet
from PIL import Image
from torchvision.transforms.v2 import functional as F

from cache_store.errors import DataError
from cache_store.snapshots.store import SnapshotStore
from cache_store.storage.open import open_storage
from workers.data.images import prepare as module
from workers.data.images.formats import digits as digits_format
from workers.data.images.formats import parquet
from workers.data.images.formats.digits import digits
from workers.data.images.inspect import inspect
from workers.data.images.prepare import prepare
from workers.specs.data_results import ImageDataResult
from workers.specs.experiment import ImageSpec


@pytest.fixture
def snapshots(tmp_path: Path) -> SnapshotStore:
    return SnapshotStore(open_storage(str(tmp_path / "store")))


def content(snapshots: SnapshotStore, result: ImageDataResult, split: str) -> tuple[np.ndarray, np.ndarray]:
    stored = snapshots.load({"train": result.train, "test": result.test}[split])
    shards = [stored.shard(i) for i in range(stored.spec.shards)]
    return np.concatenate([s[0] for s in shards]), np.concatenate([s[1] for s in shards])


def test_digits_are_scaled_to_bytes_and_repeated_over_three_channels(snapshots: SnapshotStore) -> None:
    result = prepare(ImageSpec(name="digits"), snapshots)
    assert result.rows == {"train": 1437, "test": 360}
    assert result.classes == 10
    images, labels = content(snapshots, result, "test")
    source, targets = digits()["test"]
    assert images.shape == (360, 3, 8, 8)
    assert images.dtype == np.uint8
    assert (images == np.rint(source * 255 / 16)[:, None]).all()
    assert images.max() == 255
    assert (labels == targets).all()


def test_parquet_rows_keep_order_and_pixels_over_row_groups_files_and_shards(
    tmp_path: Path, snapshots: SnapshotStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SHARD_BYTES", 9 * (3 * 32 * 32 + 8))
    images, labels = digit_images(70)
    encoded = [encode(image) for image in images]
    source = tmp_path / "data"
    write_parquet(source / "train-00000-of-00002.parquet", encoded[:33], labels[:33].tolist())
    write_parquet(source / "train-00001-of-00002.parquet", encoded[33:60], labels[33:60].tolist())
    write_parquet(source / "test-00000-of-00001.parquet", encoded[60:], labels[60:].tolist())
    result = prepare(ImageSpec(name="cifar10", path=str(tmp_path)), snapshots)
    assert snapshots.load(result.train).spec.shards == 7
    for split, part in (("train", slice(0, 60)), ("test", slice(60, 70))):
        stored, targets = content(snapshots, result, split)
        assert (stored == images[part].transpose(0, 3, 1, 2)).all()
        assert (targets == labels[part]).all()


def test_torchvisions_batches_are_stored_unchanged(tmp_path: Path, snapshots: SnapshotStore) -> None:
    images, labels = pickle_set(tmp_path)
    result = prepare(ImageSpec(name="cifar10", path=str(tmp_path)), snapshots)
    stored, targets = content(snapshots, result, "train")
    assert (stored == images[:30]).all()
    assert (targets == labels[:30]).all()
    assert (content(snapshots, result, "test")[0] == images[30:]).all()


def test_folder_images_are_resized_and_cut_as_torchvision_does(tmp_path: Path, snapshots: SnapshotStore) -> None:
    folder_set(tmp_path / "digits")
    result = prepare(ImageSpec(name="folder", path=str(tmp_path / "digits"), image_size=14), snapshots)
    stored, labels = content(snapshots, result, "train")
    paths = sorted((tmp_path / "digits" / "train").glob("*/*.png"))
    assert len(paths) == len(stored) == 40
    for path, image, label in zip(paths, stored, labels, strict=True):
        assert path.parent.name == f"digit{label}"
        resized = F.resize(Image.open(path), [16], antialias=True)
        assert (np.asarray(F.center_crop(resized, [16, 16])).transpose(2, 0, 1) == image).all()


def test_another_resize_of_a_folder_is_another_set(tmp_path: Path, snapshots: SnapshotStore) -> None:
    folder_set(tmp_path / "digits")
    results = [
        prepare(ImageSpec(name="folder", path=str(tmp_path / "digits"), image_size=8, resize=side), snapshots)
        for side in (8, 9)
    ]
    assert results[0].train != results[1].train
    assert results[0].digest != results[1].digest


def test_grey_palette_and_jpeg_images_become_rgb(tmp_path: Path, snapshots: SnapshotStore) -> None:
    images, labels = digit_images(4)
    grey = images[0, :, :, 0]
    palette = Image.fromarray(images[1]).convert("P")
    import io

    stream = io.BytesIO()
    palette.save(stream, "PNG")
    encoded = [encode(grey), stream.getvalue(), encode(images[2], "JPEG"), encode(images[3])]
    for split in ("train", "test"):
        write_parquet(tmp_path / f"{split}-0.parquet", encoded, labels.tolist(), image_column="image")
    stored, _ = content(snapshots, prepare(ImageSpec(name="cifar10", path=str(tmp_path)), snapshots), "test")
    assert (stored[0] == grey).all()
    assert (stored[1] == np.asarray(palette.convert("RGB")).transpose(2, 0, 1)).all()
    assert np.abs(stored[2].astype(int) - images[2].transpose(2, 0, 1)).mean() < 12


def test_a_complete_set_is_not_decoded_again_and_progress_counts_it(
    snapshots: SnapshotStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[dict[str, Any]] = []
    first = prepare(ImageSpec(name="digits"), snapshots, lambda **update: seen.append(update))
    assert seen[-1] == {"done": 1797, "total": 1797, "unit": "images"}
    assert [update["done"] for update in seen] == sorted({update["done"] for update in seen})
    monkeypatch.setattr(digits_format.Digits, "image", lambda *_: pytest.fail("decoded again"))
    assert prepare(ImageSpec(name="digits"), snapshots) == first


def test_only_the_missing_shards_are_decoded(
    tmp_path: Path, snapshots: SnapshotStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SHARD_BYTES", 10 * (3 * 32 * 32 + 8))
    parquet_set(tmp_path / "data")
    data = ImageSpec(name="cifar10", path=str(tmp_path))
    whole = prepare(data, snapshots)
    commits = tmp_path / "store" / "sets" / whole.train / "commits"
    next(path for path in commits.iterdir() if path.name.endswith("2.json")).unlink()
    decoded: list[int] = []
    original = parquet.ParquetFiles.image
    monkeypatch.setattr(parquet.ParquetFiles, "image", lambda *given: (decoded.append(1), original(*given))[1])
    assert prepare(data, snapshots) == whole
    assert len(decoded) == 10


def test_damaged_commit_records_are_replaced(
    tmp_path: Path, snapshots: SnapshotStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SHARD_BYTES", 10 * (3 * 32 * 32 + 8))
    parquet_set(tmp_path / "data")
    data = ImageSpec(name="cifar10", path=str(tmp_path))
    whole = prepare(data, snapshots)
    for record in (tmp_path / "store" / "sets" / whole.train / "commits").iterdir():
        record.chmod(0o644)
        record.write_bytes(b"{}")
    assert prepare(data, snapshots) == whole


def test_deep_pixels_in_parquet_are_refused_by_file_and_row(tmp_path: Path, snapshots: SnapshotStore) -> None:
    images, labels = digit_images(3)
    deep = np.full((32, 32), 40_000, dtype=np.uint16)
    for split in ("train", "test"):
        write_parquet(tmp_path / f"{split}-0.parquet", [encode(images[0]), encode(deep)], labels[:2].tolist())
    with pytest.raises(DataError, match=r"row 1 of .*train-0\.parquet: .*I;16; allowed: 8 bits a channel"):
        prepare(ImageSpec(name="cifar10", path=str(tmp_path)), snapshots)


@pytest.mark.parametrize("damage", ["truncated", "garbage", "empty", "null"])
def test_a_corrupt_image_is_named_by_file_and_row(tmp_path: Path, snapshots: SnapshotStore, damage: str) -> None:
    images, labels = digit_images(30)
    encoded: list[bytes | None] = [encode(image, "JPEG") for image in images]
    good = encoded[17]
    assert good is not None
    encoded[17] = {
        "truncated": good[: len(good) // 2],
        "garbage": b"\xff\xd8" * 40,
        "empty": b"",
        "null": None,
    }[damage]
    encoded[25] = b"also bad, reported after the first"
    write_parquet(tmp_path / "train-0.parquet", encoded, labels.tolist())
    write_parquet(tmp_path / "test-0.parquet", encoded[:5], labels[:5].tolist())
    with pytest.raises(DataError, match=r"row 17 of .*train-0\.parquet: the image cannot be decoded"):
        prepare(ImageSpec(name="cifar10", path=str(tmp_path)), snapshots)


def test_a_corrupt_image_file_of_a_folder_is_named(tmp_path: Path, snapshots: SnapshotStore) -> None:
    folder_set(tmp_path / "d")
    bad = sorted((tmp_path / "d" / "train" / "digit3").iterdir())[0]
    bad.write_bytes(bad.read_bytes()[:30])
    with pytest.raises(DataError, match=f"{bad.name}: the image cannot be decoded"):
        prepare(ImageSpec(name="folder", path=str(tmp_path / "d"), image_size=8), snapshots)


def test_an_image_of_another_size_is_named(tmp_path: Path, snapshots: SnapshotStore) -> None:
    images, labels = digit_images(6)
    encoded: list[bytes | None] = [encode(image) for image in images]
    encoded[4] = encode(images[4][:30])
    for split in ("train", "test"):
        write_parquet(tmp_path / f"{split}-0.parquet", encoded, labels.tolist())
    with pytest.raises(DataError, match=r"row 4 of .*: the image has 30 x 32 pixels; allowed: 32 x 32"):
        prepare(ImageSpec(name="cifar10", path=str(tmp_path)), snapshots)


@pytest.mark.parametrize(
    ("label", "shown"), [(10, "the label is 10"), (-1, "the label is -1"), (None, "the label is missing")]
)
def test_a_bad_label_is_named_with_the_allowed_range(
    tmp_path: Path, snapshots: SnapshotStore, label: int | None, shown: str
) -> None:
    images, labels = digit_images(20)
    bad: list[int | None] = [*labels.tolist()]
    bad[11] = bad[13] = label
    encoded = [encode(image) for image in images]
    write_parquet(tmp_path / "train-0.parquet", encoded, labels.tolist())
    write_parquet(tmp_path / "test-0.parquet", encoded, bad)
    with pytest.raises(DataError, match=rf"row 11 of .*test-0\.parquet: {shown}; allowed: 0 to 9 \(and 1 more\)"):
        prepare(ImageSpec(name="cifar10", path=str(tmp_path)), snapshots)


def test_a_changed_source_is_another_set(tmp_path: Path, snapshots: SnapshotStore) -> None:
    parquet_set(tmp_path / "data")
    data = ImageSpec(name="cifar10", path=str(tmp_path))
    first = prepare(data, snapshots)
    parquet_set(tmp_path / "data", test=9)
    assert prepare(data, snapshots).test != first.test


def test_cifar100_labels_reach_up_to_99(tmp_path: Path, snapshots: SnapshotStore) -> None:
    images, _ = digit_images(3)
    for split in ("train", "test"):
        encoded = [encode(image) for image in images]
        write_parquet(tmp_path / f"{split}-0.parquet", encoded, [0, 57, 99], label_column="fine_label")
    result = prepare(ImageSpec(name="cifar100", path=str(tmp_path)), snapshots)
    assert result.classes == 100
    assert content(snapshots, result, "train")[1].tolist() == [0, 57, 99]


def test_files_that_changed_since_the_plan_are_refused(tmp_path: Path, snapshots: SnapshotStore) -> None:
    parquet_set(tmp_path / "data")
    data = ImageSpec(name="cifar10", path=str(tmp_path))
    planned = inspect(data).fingerprint
    prepare(data, snapshots, fingerprint=planned)
    parquet_set(tmp_path / "data", test=9)
    with pytest.raises(DataError, match="changed since the run was planned"):
        prepare(data, snapshots, fingerprint=planned)
