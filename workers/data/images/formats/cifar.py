"""CIFAR-10 and CIFAR-100 as Parquet files or as torchvision's download: finding the files, reading a pickle.

Nothing in a pickle is run: only plain containers and numpy arrays are read.
"""

from __future__ import annotations

import io
import pickle
from typing import Any

import numpy as np
from fsspec.implementations.local import LocalFileSystem

from cache_store.errors import DataError
from workers.data.files import (
    PARQUET_FOLDERS,
    SourceFile,
    allowed_at,
    base_name,
    infos_of,
    join,
    open_root,
    source_file,
)
from workers.data.images.facts import FACTS, SPLITS, Split
from workers.data.images.formats.base import ImageFiles, fail
from workers.data.images.formats.decoder import _Decoder, _Piece
from workers.specs.experiment import ImageSpec


def locate_cifar(data: ImageSpec) -> ImageFiles:
    """The Parquet files or pickles under `data.path`, downloaded first where that is wanted. DataError as `locate`."""
    filesystem, root = open_root(data)
    if filesystem.isfile(root):  # one Parquet file of a folder: the folder is meant
        root = root.rsplit("/", 1)[0]
    found = _find_pickles(data, filesystem, root) or _find_parquet(data, filesystem, root)
    if found is None and data.download:
        _download(data, filesystem, root)
        found = _find_pickles(data, filesystem, root)
    if found is None:
        what = "holds no data" if filesystem.exists(root) else "does not exist"
        hint = "" if data.download else "; `data.download: true` fetches it"
        raise DataError(f"data.path: {data.path} {what}; allowed: {allowed_at(data.name)}{hint}")
    return found


def _download(data: ImageSpec, filesystem: Any, root: str) -> None:
    """Let torchvision download its copy into `root` (the only place here that imports torchvision)."""
    if not isinstance(filesystem, LocalFileSystem):
        raise DataError(f"data.download: downloads go to a local folder, not to {data.path}")
    from torchvision import datasets

    pickles = FACTS[data.name].pickles
    assert pickles is not None
    try:
        getattr(datasets, pickles.dataset)(root, download=True)
    except (OSError, RuntimeError) as error:
        raise DataError(f"data.download: cannot download {data.name} to {root}: {error}") from error


def _find_parquet(data: ImageSpec, filesystem: Any, root: str) -> ImageFiles | None:
    facts = FACTS[data.name]
    for name in PARQUET_FOLDERS:
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
                rows, names = _parquet_outline(filesystem, str(info["name"]))
            except (OSError, ValueError) as error:
                problems.append(f"data.path: {info['name']} is not a readable Parquet file: {error}")
                continue
            image = next((column for column in ("img", "image") if column in names), None)
            label = next((column for column in facts.labels if column in names), None)
            if image is None or label is None:
                problems.append(
                    f"data.path: {info['name']} has the columns {', '.join(names)}; needed: "
                    f"img or image, and {' or '.join(facts.labels)}"
                )
                continue
            columns.add((image, label))
            described.append(source_file(filesystem, root, info, rows))
        files[split] = tuple(described)
        if described and not sum(file.rows for file in described):
            problems.append(f"data.path: the {split} files in {folder} hold no rows")
    if len(columns) > 1:
        named = "; ".join(", ".join(pair) for pair in sorted(columns))
        problems.append(f"data.path: the Parquet files in {folder} differ in their columns: {named}")
    fail(problems)
    return ImageFiles("parquet", root, filesystem, files, facts.class_names, columns.pop())


def _is_split(name: str, split: Split) -> bool:
    return name.startswith(f"{split}-") or name == f"{split}.parquet"


def _parquet_outline(filesystem: Any, path: str) -> tuple[int, list[str]]:
    import pyarrow.parquet as pq

    with filesystem.open(path, "rb") as stream:
        file = pq.ParquetFile(stream)
        return file.metadata.num_rows, list(file.schema_arrow.names)


def _find_pickles(data: ImageSpec, filesystem: Any, root: str) -> ImageFiles | None:
    facts = FACTS[data.name]
    pickles = facts.pickles
    assert pickles is not None
    wanted = [name for split in SPLITS for name in pickles.files[split]]
    for folder in (root, join(root, pickles.folder)):
        infos = {base_name(str(info["name"])): info for info in infos_of(filesystem, folder) if info["type"] == "file"}
        if infos.keys() & set(wanted):
            break
    else:
        return None
    problems = [f"data.path: {name} is missing in {folder}" for name in wanted if name not in infos]
    files: dict[Split, tuple[SourceFile, ...]] = {}
    for split in SPLITS:
        described = []
        for name in pickles.files[split]:
            if name not in infos:
                continue
            try:
                _, labels = read_pickle(filesystem, str(infos[name]["name"]), pickles.label)
            except DataError as error:
                problems.append(error.message)
                continue
            described.append(source_file(filesystem, root, infos[name], len(labels)))
        files[split] = tuple(described)
    fail(problems)
    return ImageFiles("pickle", root, filesystem, files, facts.class_names)


class _ArrayUnpickler(pickle.Unpickler):
    """Reads containers, strings, numbers and numpy arrays and refuses the rest, so no code of a file runs."""

    def find_class(self, module: str, name: str) -> Any:
        if name == "_reconstruct" and module in ("numpy.core.multiarray", "numpy._core.multiarray"):
            return np.empty(0).__reduce__()[0]  # wherever this version of numpy keeps it
        if module == "numpy" and name in ("ndarray", "dtype"):
            return getattr(np, name)
        if (module, name) == ("_codecs", "encode"):
            return _latin1
        raise pickle.UnpicklingError(f"{module}.{name} is not allowed in a data file")


def _latin1(text: str, encoding: str = "latin1") -> bytes:
    return text.encode("latin1")


def read_pickle(filesystem: Any, path: str, label_key: str) -> tuple[np.ndarray, list[Any]]:
    """One batch of torchvision's CIFAR folder: images uint8 (N, 3, 32, 32) and its N labels as they stand.

    Only plain containers and numpy arrays are read. Raises DataError naming the file.
    """
    try:
        with filesystem.open(path, "rb") as stream:
            content = _ArrayUnpickler(io.BytesIO(stream.read()), encoding="latin1").load()
        images = np.asarray(content["data"]).reshape(-1, 3, 32, 32)
        labels = list(content[label_key])
    except KeyError as error:
        raise DataError(f"data.path: {path} has no entry {error}; needed: data and {label_key}") from error
    except (
        OSError,
        EOFError,
        pickle.UnpicklingError,
        ValueError,
        TypeError,
        AttributeError,
        IndexError,
    ) as error:
        raise DataError(f"data.path: {path} is not a CIFAR batch: {error}") from error
    if images.dtype != np.uint8 or len(images) != len(labels):
        raise DataError(
            f"data.path: {path} holds {len(images)} images of {images.dtype} and {len(labels)} labels; "
            "needed: uint8 images of 3 x 32 x 32, one label each"
        )
    return images, labels


class _Pickle(_Decoder):
    def file_piece(self, split: Split, index: int, start: int, stop: int) -> _Piece:
        file = self.source.files[split][index]
        pickles = FACTS[self.data.name].pickles
        assert pickles is not None
        images, labels = read_pickle(self.source.filesystem, file.path, pickles.label)
        return _Piece(file.path, start, images[start:stop], labels[start:stop])

    def image(self, item: np.ndarray) -> np.ndarray:
        return item
