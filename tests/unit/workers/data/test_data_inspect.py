from __future__ import annotations

import hashlib
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import sklearn
from data_makers import digit_images, encode, folder_set, parquet_set, pickle_set, write_parquet
from sklearn.datasets import load_digits

from cache_store.errors import ConfigError, DataError
from workers.data.images.facts import SPLITS
from workers.data.images.formats import digits as digits_module
from workers.data.images.formats.digits import digits
from workers.data.images.formats.table import IMAGE_FORMATS
from workers.data.images.inspect import inspect, locate, resize_of
from workers.specs.experiment import ImageSpec


def test_inspect_imports_neither_torch_nor_scikit_learn(tmp_path: Path) -> None:
    parquet_set(tmp_path)
    code = (
        "import sys\n"
        "from workers.data.images.inspect import inspect\n"
        "from workers.specs.experiment import ImageSpec\n"
        "inspect(ImageSpec(name='digits'))\n"
        f"inspect(ImageSpec(name='cifar10', path={str(tmp_path)!r}))\n"
        "print(sorted({'torch', 'torchvision', 'ray', 'sklearn', 'pandas', 'scipy'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_digits_have_a_fixed_stratified_test_split_of_360() -> None:
    outline = inspect(ImageSpec(name="digits", path="anything"))
    assert (outline.train_rows, outline.test_rows, outline.classes) == (1437, 360, 10)
    assert outline.native == (3, 8, 8)
    assert np.bincount(digits()["test"][1]).tolist() == [36] * 10
    # Fixed: a change here would silently compare runs on different test sets.
    assert digits()["test"][1][:12].tolist() == DIGITS_TEST_LABELS


DIGITS_TEST_LABELS = [3, 6, 7, 9, 7, 8, 0, 9, 8, 9, 3, 2]


def test_the_digits_are_those_of_scikit_learn_wherever_it_keeps_them(monkeypatch: pytest.MonkeyPatch) -> None:
    bunch = load_digits()
    table = np.column_stack([bunch.data, bunch.target])
    stamp = inspect(ImageSpec(name="digits")).fingerprint
    for elsewhere in (False, True):
        if elsewhere:
            monkeypatch.setattr("pathlib.Path.is_file", lambda self: False)
        digits.cache_clear()
        assert np.array_equal(digits_module._table(), table)
        splits = [digits()[split] for split in SPLITS]
        assert [(images.dtype, labels.dtype) for images, labels in splits] == [(np.float64, np.int64)] * 2
        rows = np.concatenate([np.column_stack([images.reshape(-1, 64), labels]) for images, labels in splits])
        assert sorted(map(tuple, rows)) == sorted(map(tuple, table))
        assert inspect(ImageSpec(name="digits")).fingerprint == stamp


def test_the_fingerprint_of_the_digits_names_scikit_learns_version_and_the_content() -> None:
    for split, (images, labels) in digits().items():
        (file,) = locate(ImageSpec(name="digits")).files[split]
        content = hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest()
        assert file.stamp == f"scikit-learn {sklearn.__version__} {content}"


def test_the_digits_constants_are_those_of_the_training_images() -> None:
    pixels = np.rint(digits()["train"][0] * (255 / 16)) / 255
    facts = IMAGE_FORMATS["digits"].facts
    assert facts.mean == pytest.approx([pixels.mean()] * 3, abs=1e-4)
    assert facts.std == pytest.approx([pixels.std()] * 3, abs=1e-4)


@pytest.mark.parametrize("folder", ["", "data", "plain_text"])
def test_parquet_is_found_itself_and_nested(tmp_path: Path, folder: str) -> None:
    parquet_set(tmp_path / folder)
    outline = inspect(ImageSpec(name="cifar10", path=str(tmp_path)))
    assert (outline.train_rows, outline.test_rows, outline.classes) == (40, 10, 10)
    assert outline.native == (3, 32, 32)
    assert outline.class_names[3] == "cat"
    assert outline.mean == (0.4914, 0.4822, 0.4465)
    assert outline.std == (0.2023, 0.1994, 0.2010)


def test_one_parquet_file_stands_for_its_folder(tmp_path: Path) -> None:
    parquet_set(tmp_path)
    file = tmp_path / "train-00000-of-00001.parquet"
    assert inspect(ImageSpec(name="cifar10", path=str(file))).test_rows == 10


def test_several_shards_of_a_split_add_up(tmp_path: Path) -> None:
    parquet_set(tmp_path)
    images, labels = digit_images(5)
    write_parquet(tmp_path / "train-00001-of-00002.parquet", [encode(i) for i in images], labels.tolist())
    assert inspect(ImageSpec(name="cifar10", path=str(tmp_path))).train_rows == 45


def test_cifar100_reads_fine_labels_and_has_a_hundred_classes(tmp_path: Path) -> None:
    parquet_set(tmp_path, label_column="fine_label")
    outline = inspect(ImageSpec(name="cifar100", path=str(tmp_path)))
    assert outline.classes == len(set(outline.class_names)) == 100
    assert list(outline.class_names) == sorted(outline.class_names)


def test_parquet_is_read_from_other_file_systems() -> None:
    import fsspec

    images, labels = digit_images(4)
    memory = fsspec.filesystem("memory")
    from io import BytesIO

    import pyarrow as pa
    import pyarrow.parquet as pq

    for split in ("train", "test"):
        stream = BytesIO()
        rows = [{"bytes": encode(image)} for image in images]
        pq.write_table(pa.table({"image": rows, "label": labels}), stream)
        memory.pipe(f"/bucket-inspect/{split}-0.parquet", stream.getvalue())
    outline = inspect(ImageSpec(name="cifar10", path="memory://bucket-inspect"))
    assert (outline.train_rows, outline.test_rows) == (4, 4)


def test_torchvisions_download_folder_is_read_itself_and_from_its_parent(tmp_path: Path) -> None:
    pickle_set(tmp_path)
    for path in (tmp_path, tmp_path / "cifar-10-batches-py"):
        outline = inspect(ImageSpec(name="cifar10", path=str(path)))
        assert (outline.train_rows, outline.test_rows) == (30, 6)


def test_a_pickle_that_would_run_code_is_refused(tmp_path: Path) -> None:
    pickle_set(tmp_path)

    class Evil:
        def __reduce__(self) -> tuple[object, ...]:
            return os.mkdir, (str(tmp_path / "ran"),)

    (tmp_path / "cifar-10-batches-py" / "data_batch_2").write_bytes(pickle.dumps({"data": Evil()}))
    with pytest.raises(DataError, match=r"data_batch_2 is not a CIFAR batch: .*mkdir is not allowed"):
        inspect(ImageSpec(name="cifar10", path=str(tmp_path)))
    assert not (tmp_path / "ran").exists()


def test_missing_batches_of_a_download_are_all_named(tmp_path: Path) -> None:
    pickle_set(tmp_path)
    for name in ("data_batch_3", "test_batch"):
        (tmp_path / "cifar-10-batches-py" / name).unlink()
    with pytest.raises(DataError) as caught:
        inspect(ImageSpec(name="cifar10", path=str(tmp_path)))
    assert "data_batch_3" in caught.value.message
    assert "test_batch" in caught.value.message


@pytest.mark.parametrize("test_name", ["test", "val"])
def test_a_folder_has_a_class_a_subfolder(tmp_path: Path, test_name: str) -> None:
    folder_set(tmp_path, test_name)
    outline = inspect(ImageSpec(name="folder", path=str(tmp_path), image_size=14))
    assert outline.class_names == tuple(f"digit{i}" for i in range(10))
    assert (outline.train_rows, outline.test_rows) == (40, 20)
    assert outline.native == (3, 16, 16)
    assert outline.mean == (0.485, 0.456, 0.406)


def test_the_fingerprint_follows_names_and_contents_not_times(tmp_path: Path) -> None:
    folder_set(tmp_path)
    data = ImageSpec(name="folder", path=str(tmp_path))
    first = inspect(data).fingerprint
    assert inspect(data).fingerprint == first
    image = next((tmp_path / "train" / "digit0").iterdir())
    os.utime(image, ns=(1, 1))
    assert inspect(data).fingerprint == first, "the same bytes, touched"
    whole, times = image.read_bytes(), image.stat()
    image.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    os.utime(image, ns=(times.st_atime_ns, times.st_mtime_ns))
    replaced = inspect(data).fingerprint
    assert replaced != first, "other bytes, with size and time kept"
    image.write_bytes(whole)
    assert inspect(data).fingerprint == first
    image.rename(image.with_name("9999.png"))
    assert inspect(data).fingerprint not in (first, replaced)


@pytest.mark.parametrize(
    ("name", "build", "expected"),
    [
        ("cifar10", None, "none given for cifar10; allowed: a folder holding train-"),
        ("cifar10", lambda root: None, "holds no data; allowed: .*cifar-10-batches-py"),
        (
            "cifar100",
            lambda root: root.rmdir(),
            "does not exist; allowed: .*cifar-100-python.*download: true",
        ),
        (
            "cifar10",
            lambda root: (root / "train-0.parquet").write_bytes(b"no"),
            "not a readable Parquet file",
        ),
        ("cifar10", lambda root: (root / "train-0.parquet").write_bytes(b"no"), r"no test-\*\.parquet"),
        ("cifar100", lambda root: parquet_set(root, label_column="coarse"), "needed: .*fine_label or label"),
        ("folder", None, "none given for folder"),
        ("folder", lambda root: root.rmdir(), "there is no folder .*; allowed: a folder with train/"),
        ("folder", lambda root: None, r"no train/; allowed: (.|\n)*no test/ or val/"),
        ("folder", lambda root: [(root / s).mkdir() for s in ("train", "val")], "no class folders in .*val"),
        ("folder", lambda root: (folder_set(root), (root / "train/empty").mkdir()), "no images in .*empty"),
        (
            "folder",
            lambda root: (folder_set(root), (root / "test/x").mkdir()),
            "train/ does not have: x; allowed",
        ),
    ],
)
def test_what_is_wrong_with_a_path_is_said(tmp_path: Path, name: str, build: object, expected: str) -> None:
    root = tmp_path / "data set"
    root.mkdir()
    if callable(build):
        build(root)
    with pytest.raises(DataError, match=expected):
        inspect(ImageSpec(name=name, path=str(root) if callable(build) else None))  # type: ignore[arg-type]


def test_an_unknown_protocol_is_a_data_error() -> None:
    with pytest.raises(DataError, match="cannot open"):
        inspect(ImageSpec(name="cifar10", path="nosuch://bucket/x"))


def test_a_failed_download_is_a_data_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torchvision.datasets

    def refuse(root: str, download: bool) -> None:
        raise RuntimeError("no network")

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", refuse)
    with pytest.raises(DataError, match=r"cannot download cifar10 to .*: no network"):
        inspect(ImageSpec(name="cifar10", path=str(tmp_path), download=True))


def test_download_puts_torchvisions_folder_at_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torchvision.datasets

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", lambda root, download: pickle_set(Path(root)))
    assert inspect(ImageSpec(name="cifar10", path=str(tmp_path), download=True)).train_rows == 30


def test_a_folder_cannot_be_downloaded(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="allowed for: cifar10, cifar100"):
        inspect(ImageSpec(name="folder", path=str(tmp_path), download=True))


def test_resize_defaults_to_the_papers_proportion() -> None:
    assert [resize_of(ImageSpec(name="digits", image_size=s)) for s in (16, 32, 224)] == [18, 37, 256]
    assert resize_of(ImageSpec(name="digits", image_size=16, resize=16)) == 16
    with pytest.raises(ConfigError, match="allowed: 16 or more"):
        resize_of(ImageSpec(name="digits", image_size=16, resize=15))


def test_linked_batches_of_a_download_count_and_a_dangling_one_is_named(tmp_path: Path) -> None:
    pickle_set(tmp_path / "real")
    linked = tmp_path / "linked"
    linked.mkdir()
    for file in (tmp_path / "real" / "cifar-10-batches-py").iterdir():
        (linked / file.name).symlink_to(file)
    assert inspect(ImageSpec(name="cifar10", path=str(linked))).train_rows == 30
    (tmp_path / "real" / "cifar-10-batches-py" / "data_batch_2").unlink()
    with pytest.raises(DataError, match="data_batch_2 leads nowhere"):
        inspect(ImageSpec(name="cifar10", path=str(linked)))
