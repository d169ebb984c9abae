"""Small data sets in the formats users bring, made of scikit-learn's real digits."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from sklearn.datasets import load_digits


def digit_images(count: int, side: int = 32) -> tuple[np.ndarray, np.ndarray]:
    """Real digits blown up, coloured so that the channels differ: uint8 (N, side, side, 3), labels (N,)."""
    bunch = load_digits()
    grey = np.rint(bunch.images[:count] * (255 / 16)).astype(np.uint8)
    grown = np.stack([np.asarray(Image.fromarray(image).resize((side, side))) for image in grey])
    return np.stack([grown, 255 - grown, grown // 2], axis=-1), bunch.target[:count].astype(np.int64)


def encode(image: np.ndarray, kind: str = "PNG") -> bytes:
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, kind)
    return stream.getvalue()


def write_parquet(
    path: Path,
    images: list[bytes | None],
    labels: list[Any],
    image_column: str = "img",
    label_column: str = "label",
    row_group_size: int = 7,
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"bytes": image, "path": f"{row}.png"} for row, image in enumerate(images)]
    table = pa.table(
        {
            image_column: pa.array(rows, pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
            label_column: pa.array(labels, pa.int64()),
        }
    )
    pq.write_table(table, path, row_group_size=row_group_size)


def parquet_set(root: Path, train: int = 40, test: int = 10, **columns: str) -> tuple[np.ndarray, np.ndarray]:
    """Train and test Parquet files; returns all images and labels, train first."""
    images, labels = digit_images(train + test)
    encoded = [encode(image) for image in images]
    write_parquet(root / "train-00000-of-00001.parquet", encoded[:train], labels[:train].tolist(), **columns)
    write_parquet(root / "test-00000-of-00001.parquet", encoded[train:], labels[train:].tolist(), **columns)
    return images, labels


def folder_set(root: Path, test_name: str = "test", train: int = 40, test: int = 20) -> None:
    """train/ and test/ (or val/) with a folder a digit; images of different sizes, some not square."""
    images, labels = digit_images(train + test, side=24)
    for row, (image, label) in enumerate(zip(images, labels, strict=True)):
        split = "train" if row < train else test_name
        folder = root / split / f"digit{label}"
        folder.mkdir(parents=True, exist_ok=True)
        shaped = image[: 24 - row % 5, : 24 - row % 3]
        (folder / f"{row:04d}.png").write_bytes(encode(shaped))


def plain_classes(root: Path, splits: dict[str, int], classes: tuple[str, ...] = ("cat", "dog")) -> None:
    """Class folders of `splits[split]` noisy 24 x 24 PNG files each, in a folder a split ("" is `root` itself)."""
    draw = np.random.default_rng(0)
    for split, count in splits.items():
        for name in classes:
            folder = root / split / name
            folder.mkdir(parents=True, exist_ok=True)
            for number in range(count):
                image = draw.integers(0, 256, (24, 24, 3), dtype=np.uint8)
                (folder / f"{number}.png").write_bytes(encode(image))


def pickle_set(root: Path, per_batch: int = 6) -> tuple[np.ndarray, np.ndarray]:
    """torchvision's cifar-10-batches-py with few rows; returns all images (N, 3, 32, 32) and labels."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    images, labels = digit_images(6 * per_batch)
    planes = np.ascontiguousarray(images.transpose(0, 3, 1, 2))
    names = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
    for index, name in enumerate(names):
        part = slice(index * per_batch, (index + 1) * per_batch)
        batch = {"data": planes[part].reshape(per_batch, -1), "labels": labels[part].tolist()}
        (folder / name).write_bytes(pickle.dumps(batch, protocol=2))
    return planes, labels
