"""Images in Parquet files as on the Hugging Face hub: finding the files, and reading them."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image

from cache_store.errors import DataError
from workers.data.files import SourceFile, base_name, infos_of, join, source_file
from workers.data.images.facts import SPLITS, Split
from workers.data.images.formats.base import FileFormat, ImageFiles, ImagePiece, fail, overlaps
from workers.data.images.formats.pixels import is_deep

#: Where the files may lie under the given path, the first folder that has any counts.
FOLDERS = ("", "data", "plain_text", "cifar10", "cifar100")


class ParquetFiles(FileFormat):
    """Encoded images in a column of Parquet files."""

    name = "parquet"
    pillow = True

    def pieces(self, source: ImageFiles, split: Split, rows: range) -> Iterator[ImagePiece]:
        """See `FileFormat`: the rows of one row group at a time."""
        import pyarrow as pa

        files = source.files[split]
        for start, stop, index in overlaps(source.lengths(split), rows):
            path = files[index].path
            try:
                with source.filesystem.open(path, "rb") as stream:
                    yield from _groups(stream, path, source.columns, range(start, stop))
            except (OSError, pa.ArrowException) as error:
                raise DataError(f"data.path: {path} cannot be read: {error}") from error

    def image(self, source: ImageFiles, item: Any, side: int) -> np.ndarray:
        """See `FileFormat`."""
        value = item.as_py()
        encoded = value.get("bytes") if isinstance(value, dict) else value
        if not encoded:
            raise ValueError("the column holds no bytes")
        with Image.open(io.BytesIO(encoded)) as image:
            if is_deep(image):
                raise ValueError(f"pixels of mode {image.mode}; allowed: 8 bits a channel")
            return np.asarray(image.convert("RGB")).transpose(2, 0, 1)


def _groups(stream: Any, path: str, columns: tuple[str, str], rows: range) -> Iterator[ImagePiece]:
    """These rows of one file, a row group at a time."""
    import pyarrow.parquet as pq

    image, label = columns
    parquet = pq.ParquetFile(stream)
    lengths = [parquet.metadata.row_group(group).num_rows for group in range(parquet.num_row_groups)]
    for low, high, group in overlaps(lengths, rows):
        table = parquet.read_row_group(group, columns=[image, label]).slice(low, high - low)
        yield ImagePiece(path, sum(lengths[:group]) + low, table.column(image), table.column(label).to_pylist())


def find_parquet(
    filesystem: Any, root: str, labels: tuple[str, ...], class_names: tuple[str, ...]
) -> ImageFiles | None:
    """Find the Parquet files of both splits under `root`; None when there is none of either. `labels`: columns that may
    hold the label, the first one present counts. DataError, all problems at once, when they do not do."""
    for name in FOLDERS:
        folder = join(root, name)
        infos = [info for info in infos_of(filesystem, folder) if str(info["name"]).endswith(".parquet")]
        by_split = {split: [i for i in infos if _is_split(base_name(i["name"]), split)] for split in SPLITS}
        if any(by_split.values()):
            break
    else:
        return None
    problems = [
        f"data.path: no {split}-*.parquet in {folder} (found: {', '.join(base_name(i['name']) for i in infos)})"
        for split in SPLITS
        if not by_split[split]
    ]
    files: dict[Split, tuple[SourceFile, ...]] = {}
    columns: set[tuple[str, str]] = set()
    for split in SPLITS:
        described = []
        for info in by_split[split]:
            try:
                rows, pair = _outline(filesystem, str(info["name"]), labels)
            except DataError as error:
                problems.append(error.message)
                continue
            columns.add(pair)
            described.append(source_file(filesystem, root, info, rows))
        files[split] = tuple(described)
        if described and not sum(file.rows for file in described):
            problems.append(f"data.path: the {split} files in {folder} hold no rows")
    if len(columns) > 1:
        named = "; ".join(", ".join(pair) for pair in sorted(columns))
        problems.append(f"data.path: the Parquet files in {folder} differ in their columns: {named}")
    fail(problems)
    return ImageFiles(ParquetFiles(), root, filesystem, files, class_names, columns.pop())


def _is_split(name: str, split: Split) -> bool:
    return name.startswith(f"{split}-") or name == f"{split}.parquet"


def _outline(filesystem: Any, path: str, labels: tuple[str, ...]) -> tuple[int, tuple[str, str]]:
    """(rows, (image column, label column)) of one file. DataError when it is none, or lacks a column."""
    import pyarrow.parquet as pq

    try:
        with filesystem.open(path, "rb") as stream:
            file = pq.ParquetFile(stream)
            rows, names = file.metadata.num_rows, list(file.schema_arrow.names)
    except (OSError, ValueError) as error:
        raise DataError(f"data.path: {path} is not a readable Parquet file: {error}") from error
    image = next((column for column in ("img", "image") if column in names), None)
    label = next((column for column in labels if column in names), None)
    if image is None or label is None:
        raise DataError(
            f"data.path: {path} has the columns {', '.join(names)}; needed: img or image, and {' or '.join(labels)}"
        )
    return rows, (image, label)
