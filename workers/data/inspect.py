"""What a data set is, read from its files without decoding an image and without importing torch.

`locate` finds the files of both splits, `inspect` describes them. Everything that is known about a named data
set beforehand stands in one typed table, `FACTS`.
"""

from __future__ import annotations

import hashlib
import io
import os
import pickle
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import fsspec
import numpy as np
from fsspec.implementations.local import LocalFileSystem

from cache_store.errors import ConfigError, DataError
from workers.specs import DataSpec

Split = Literal["train", "test"]
SPLITS: tuple[Split, ...] = ("train", "test")
Triple = tuple[float, float, float]

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".ppm", ".pgm", ".tif", ".tiff", ".webp")
#: Where Parquet files may lie under the given path, the first folder that has any counts.
PARQUET_FOLDERS = ("", "data", "plain_text", "cifar10", "cifar100")
#: Images of the digits data set that form its test split, the same number for every class.
DIGITS_TEST_PER_CLASS = 36

_CIFAR10_NAMES = "airplane automobile bird cat deer dog frog horse ship truck"
_CIFAR100_NAMES = (
    "apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly "
    "camel can castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup "
    "dinosaur dolphin elephant flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower "
    "leopard lion lizard lobster man maple_tree motorcycle mountain mouse mushroom oak_tree orange orchid "
    "otter palm_tree pear pickup_truck pine_tree plain plate poppy porcupine possum rabbit raccoon ray "
    "road rocket rose sea seal shark shrew skunk skyscraper snail snake spider squirrel streetcar "
    "sunflower sweet_pepper table tank telephone television tiger tractor train trout tulip turtle "
    "wardrobe whale willow_tree wolf woman worm"
)


@dataclass(frozen=True)
class PickleFacts:
    """torchvision's download of a data set: its folder, the files of each split and the key of the labels."""

    folder: str
    files: Mapping[Split, tuple[str, ...]]
    label: str
    dataset: str


@dataclass(frozen=True)
class Facts:
    """What is known of a data set beforehand. `mean` and `std` normalise pixels scaled to 0..1 by channel."""

    mean: Triple
    std: Triple
    class_names: tuple[str, ...] = ()
    #: Side of the stored images; None: they are stored at the side given by `resize`.
    side: int | None = None
    #: Columns of a Parquet file that may hold the label, the first one present counts.
    labels: tuple[str, ...] = ()
    pickles: PickleFacts | None = None


FACTS: dict[str, Facts] = {
    "digits": Facts(
        # Of the 1,437 training images, as stored (0..255).
        mean=(0.3053, 0.3053, 0.3053),
        std=(0.3761, 0.3761, 0.3761),
        class_names=tuple("0123456789"),
        side=8,
    ),
    "cifar10": Facts(
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2023, 0.1994, 0.2010),
        class_names=tuple(_CIFAR10_NAMES.split()),
        side=32,
        labels=("label",),
        pickles=PickleFacts(
            folder="cifar-10-batches-py",
            files={"train": tuple(f"data_batch_{i}" for i in range(1, 6)), "test": ("test_batch",)},
            label="labels",
            dataset="CIFAR10",
        ),
    ),
    "cifar100": Facts(
        mean=(0.5071, 0.4865, 0.4409),
        std=(0.2673, 0.2564, 0.2762),
        class_names=tuple(_CIFAR100_NAMES.split()),
        side=32,
        labels=("fine_label", "label"),
        pickles=PickleFacts(
            folder="cifar-100-python",
            files={"train": ("train",), "test": ("test",)},
            label="fine_labels",
            dataset="CIFAR100",
        ),
    ),
    "folder": Facts(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)),
}


@dataclass(frozen=True)
class DataOutline:
    """A data set in figures.

    `native` is (C, H, W) of the images as stored by `prepare`; `fingerprint` (sha256, hex) changes when a
    file is added, removed, renamed, resized or rewritten; `mean` and `std` normalise pixels scaled to 0..1.
    """

    classes: int
    class_names: tuple[str, ...]
    native: tuple[int, int, int]
    train_rows: int
    test_rows: int
    fingerprint: str
    mean: Triple
    std: Triple


@dataclass(frozen=True)
class SourceFile:
    """One file. `path` opens it, `name` is relative to the data set's folder, `rows` the samples it holds,
    `stamp` what its file system changes when the file is rewritten, `label` the class of an image file."""

    path: str
    name: str
    size: int
    stamp: str
    rows: int
    label: int = -1


@dataclass(frozen=True)
class Source:
    """Where the samples of both splits lie. `columns` names the image and label columns of Parquet files."""

    format: Literal["digits", "parquet", "pickle", "folder"]
    root: str
    filesystem: Any
    files: Mapping[Split, tuple[SourceFile, ...]]
    class_names: tuple[str, ...]
    columns: tuple[str, str] = ("", "")

    def rows(self, split: Split) -> int:
        """Samples in a split."""
        return sum(file.rows for file in self.files[split])

    def fingerprint(self) -> str:
        """sha256 (hex) over format, file names, sizes and stamps."""
        digest = hashlib.sha256(self.format.encode())
        for split in SPLITS:
            for file in self.files[split]:
                digest.update(f"\x1e{split}\x1f{file.name}\x1f{file.size}\x1f{file.stamp}".encode())
        return digest.hexdigest()


def inspect(data: DataSpec) -> DataOutline:
    """Describe a data set; reads listings, Parquet footers and, for the python-pickle format, the batches.

    Raises DataError when files are missing or unreadable (all problems found at once) and ConfigError when
    `resize` is smaller than `image_size`.
    """
    return outline_of(data, locate(data))


def outline_of(data: DataSpec, source: Source) -> DataOutline:
    """The outline of a data set already located."""
    facts = FACTS[data.name]
    resize = resize_of(data)
    side = resize if facts.side is None else facts.side
    return DataOutline(
        classes=len(source.class_names),
        class_names=source.class_names,
        native=(3, side, side),
        train_rows=source.rows("train"),
        test_rows=source.rows("test"),
        fingerprint=source.fingerprint(),
        mean=facts.mean,
        std=facts.std,
    )


def resize_of(data: DataSpec) -> int:
    """Side to which images are resized before cropping; ConfigError when it is smaller than the crop."""
    resize = round(data.image_size * 256 / 224) if data.resize is None else data.resize
    if resize < data.image_size:
        raise ConfigError(
            f"data.resize: {resize} is smaller than data.image_size, {data.image_size}; allowed: "
            f"{data.image_size} or more, or none for image_size * 256 / 224"
        )
    return resize


def locate(data: DataSpec) -> Source:
    """Find the files of both splits. Raises DataError naming what is missing, where, and what is allowed."""
    return _LOCATORS[data.name](data)


# --- digits -------------------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def digits() -> dict[Split, tuple[np.ndarray, np.ndarray]]:
    """scikit-learn's digits by split: images float64 (N, 8, 8) of 0..16 and labels int64 (N,).

    The test split takes, of every class, the images with the smallest hash of content and position.
    """
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images, labels = bunch.images, bunch.target.astype(np.int64)
    order = np.array(
        [
            int.from_bytes(
                hashlib.blake2b(image.tobytes() + row.to_bytes(8, "little"), digest_size=8).digest(), "little"
            )
            for row, image in enumerate(images)
        ],
        dtype=np.uint64,
    )
    chosen = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        chosen[members[np.argsort(order[members], kind="stable")[:DIGITS_TEST_PER_CLASS]]] = True
    return {"train": (images[~chosen], labels[~chosen]), "test": (images[chosen], labels[chosen])}


def _locate_digits(data: DataSpec) -> Source:
    import sklearn

    files: dict[Split, tuple[SourceFile, ...]] = {}
    for split, (images, labels) in digits().items():
        content = hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest()
        file = SourceFile(
            path=f"sklearn.datasets.load_digits [{split}]",
            name=split,
            size=images.nbytes,
            stamp=f"scikit-learn {sklearn.__version__} {content}",
            rows=len(labels),
        )
        files[split] = (file,)
    return Source("digits", "sklearn.datasets.load_digits", None, files, FACTS["digits"].class_names)


# --- files --------------------------------------------------------------------------------------------------


def _open_root(data: DataSpec) -> tuple[Any, str]:
    if data.path is None:
        raise DataError(f"data.path: none given for {data.name}; allowed: {_allowed(data.name)}")
    path = os.path.expanduser(data.path)
    try:
        filesystem, root = fsspec.core.url_to_fs(path)
    except (ImportError, ValueError) as error:
        raise DataError(f"data.path: cannot open {data.path!r}: {error}") from error
    return filesystem, str(root)


def _allowed(name: str) -> str:
    if name == "folder":
        return "a folder with train/ and test/ (or val/), one subfolder of images a class"
    facts = FACTS[name].pickles
    assert facts is not None
    return (
        "a folder holding train-*.parquet and test-*.parquet (itself or in "
        f"{', '.join(f'{folder}/' for folder in PARQUET_FOLDERS[1:])}), or torchvision's {facts.folder}/"
    )


def _infos(filesystem: Any, folder: str) -> list[dict[str, Any]]:
    """What lies in a folder, sorted by name; empty when it does not exist. Hidden names are left out."""
    try:
        infos = filesystem.ls(folder, detail=True)
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise DataError(f"data.path: cannot list {folder}: {error}") from error
    own = folder.rstrip("/")
    visible = [i for i in infos if not _base(i["name"]).startswith(".") and i["name"].rstrip("/") != own]
    return sorted(visible, key=lambda info: str(info["name"]))


def _base(path: str) -> str:
    return path.rstrip("/").rsplit("/", 1)[-1]


def _join(folder: str, *names: str) -> str:
    return "/".join([folder.rstrip("/"), *[name for name in names if name]])


def _file(filesystem: Any, root: str, info: Mapping[str, Any], rows: int, label: int = -1) -> SourceFile:
    path = str(info["name"])
    if isinstance(filesystem, LocalFileSystem):
        status = os.stat(path)
        size, stamp = status.st_size, str(status.st_mtime_ns)
    else:
        keys = ("ETag", "etag", "md5Hash", "LastModified", "last_modified", "mtime", "updated", "created")
        size = int(info.get("size") or 0)
        stamp = next((str(info[key]) for key in keys if info.get(key) is not None), "")
    return SourceFile(path, path.removeprefix(root).lstrip("/"), size, stamp, rows, label)


def _fail(problems: Iterable[str]) -> None:
    lines = list(problems)
    if lines:
        raise DataError("\n".join(lines), problems=lines)


# --- CIFAR --------------------------------------------------------------------------------------------------


def _locate_cifar(data: DataSpec) -> Source:
    filesystem, root = _open_root(data)
    if filesystem.isfile(root):  # one Parquet file of a folder: the folder is meant
        root = root.rsplit("/", 1)[0]
    found = _find_pickles(data, filesystem, root) or _find_parquet(data, filesystem, root)
    if found is None and data.download:
        _download(data, filesystem, root)
        found = _find_pickles(data, filesystem, root)
    if found is None:
        what = "holds no data" if filesystem.exists(root) else "does not exist"
        hint = "" if data.download else "; `data.download: true` fetches it"
        raise DataError(f"data.path: {data.path} {what}; allowed: {_allowed(data.name)}{hint}")
    return found


def _download(data: DataSpec, filesystem: Any, root: str) -> None:
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


def _find_parquet(data: DataSpec, filesystem: Any, root: str) -> Source | None:
    facts = FACTS[data.name]
    for name in PARQUET_FOLDERS:
        folder = _join(root, name)
        infos = [info for info in _infos(filesystem, folder) if str(info["name"]).endswith(".parquet")]
        by_split = {split: [i for i in infos if _is_split(_base(i["name"]), split)] for split in SPLITS}
        if any(by_split.values()):
            break
    else:
        return None
    problems = [
        f"data.path: no {split}-*.parquet in {folder} (found: {', '.join(_base(i['name']) for i in infos)})"
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
            described.append(_file(filesystem, root, info, rows))
        files[split] = tuple(described)
        if described and not sum(file.rows for file in described):
            problems.append(f"data.path: the {split} files in {folder} hold no rows")
    if len(columns) > 1:
        named = "; ".join(", ".join(pair) for pair in sorted(columns))
        problems.append(f"data.path: the Parquet files in {folder} differ in their columns: {named}")
    _fail(problems)
    return Source("parquet", root, filesystem, files, facts.class_names, columns.pop())


def _is_split(name: str, split: Split) -> bool:
    return name.startswith(f"{split}-") or name == f"{split}.parquet"


def _parquet_outline(filesystem: Any, path: str) -> tuple[int, list[str]]:
    import pyarrow.parquet as pq

    with filesystem.open(path, "rb") as stream:
        file = pq.ParquetFile(stream)
        return file.metadata.num_rows, list(file.schema_arrow.names)


def _find_pickles(data: DataSpec, filesystem: Any, root: str) -> Source | None:
    facts = FACTS[data.name]
    pickles = facts.pickles
    assert pickles is not None
    wanted = [name for split in SPLITS for name in pickles.files[split]]
    for folder in (root, _join(root, pickles.folder)):
        infos = {_base(str(info["name"])): info for info in _infos(filesystem, folder) if info["type"] == "file"}
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
            described.append(_file(filesystem, root, infos[name], len(labels)))
        files[split] = tuple(described)
    _fail(problems)
    return Source("pickle", root, filesystem, files, facts.class_names)


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


# --- a folder a class ---------------------------------------------------------------------------------------


def _locate_folder(data: DataSpec) -> Source:
    filesystem, root = _open_root(data)
    if data.download:
        raise DataError("data.download: a folder cannot be downloaded; allowed for: cifar10, cifar100")
    folders: dict[Split, tuple[str, ...]] = {"train": ("train",), "test": ("test", "val")}
    problems: list[str] = []
    classes: dict[Split, dict[str, str]] = {}
    for split in SPLITS:
        present = [name for name in folders[split] if filesystem.isdir(_join(root, name))]
        if not present:
            wanted = " or ".join(f"{name}/" for name in folders[split])
            problems.append(f"data.path: {root} has no {wanted}; allowed: {_allowed('folder')}")
            continue
        folder = _join(root, present[0])
        infos = [info for info in _infos(filesystem, folder) if info["type"] == "directory"]
        classes[split] = {_base(str(info["name"])): str(info["name"]) for info in infos}
        if not infos:
            problems.append(f"data.path: no class folders in {folder}; allowed: {_allowed('folder')}")
    names = tuple(sorted(classes.get("train", {})))
    unknown = sorted(set(classes.get("test", {})) - set(names)) if names else []
    if unknown:
        problems.append(
            f"data.path: classes of the test split that train/ does not have: {', '.join(unknown)}; "
            f"allowed: {', '.join(names)}"
        )
    labels = {name: label for label, name in enumerate(names)}
    files: dict[Split, tuple[SourceFile, ...]] = {}
    for split, members in classes.items():
        described: list[SourceFile] = []
        for name, folder in members.items():
            images = [
                info
                for path, info in sorted(filesystem.find(folder, detail=True).items())
                if path.lower().endswith(IMAGE_SUFFIXES) and not _base(path).startswith(".")
            ]
            if not images:
                problems.append(f"data.path: no images in {folder}; allowed: {', '.join(IMAGE_SUFFIXES)}")
            described += [_file(filesystem, root, info, 1, labels.get(name, -1)) for info in images]
        files[split] = tuple(described)
    _fail(problems)
    return Source("folder", root, filesystem, files, names)


_LOCATORS: dict[str, Callable[[DataSpec], Source]] = {
    "digits": _locate_digits,
    "cifar10": _locate_cifar,
    "cifar100": _locate_cifar,
    "folder": _locate_folder,
}
