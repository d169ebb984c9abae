"""The files of a text data set on any file system, and the splits their names give them."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any, Literal

import fsspec
from fsspec.implementations.local import LocalFileSystem

from cache_store.errors import DataError
from workers.data.files import base_name, source_file
from workers.data.text.corpora.base import SPLITS
from workers.specs.language import TextSpec

Kind = Literal["plain", "json", "parquet", "csv", "tsv", "arrow"]
_KINDS: dict[str, Kind] = {
    ".jsonl": "json",
    ".ndjson": "json",
    ".json": "json",
    ".parquet": "parquet",
    ".csv": "csv",
    ".tsv": "tsv",
    ".tab": "tsv",
    ".arrow": "arrow",
    ".arrows": "arrow",
    ".feather": "arrow",
    ".ipc": "arrow",
}
_COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
#: `train/…`, `train.jsonl`, `test-00000-of-00001.parquet`; not `test_codecs.py`.
_SPLIT_NAME = re.compile(r"(?:(train|training)|(validation|valid|val|dev)|(test))(?:[-.].*)?")
#: Names from which a file system hides what it keeps for itself.
_HIDDEN = (".", "__pycache__")
#: What `datasets` writes beside its Arrow files.
_NOT_DATA = ("dataset_info.json", "dataset_dict.json", "state.json")


@dataclass(frozen=True)
class TextFile:
    """One file. `path` opens it, `name` is relative to the data's folder, `stamp` as of
    `SourceFile`."""

    path: str
    name: str
    size: int
    stamp: str | None
    kind: Kind


@dataclass(frozen=True)
class Folder:
    """A place on a file system: `root` is a folder, or the one file that is meant."""

    filesystem: Any
    root: str

    def read(self, path: str) -> bytes:
        """All bytes of a file, decompressed. DataError when it cannot be read."""
        with self.open(path) as stream:
            return bytes(readable(path, stream.read))

    def open(self, path: str) -> Any:
        """A binary stream of a file, decompressed by its name. DataError when it cannot be opened."""
        if not path.lower().endswith(".zst"):
            return readable(path, lambda: self.filesystem.open(path, "rb", compression="infer"))
        import pyarrow as pa

        # fsspec knows zstd only with another package.
        packed = readable(path, lambda: self.filesystem.open(path, "rb"))
        return io.BufferedReader(readable(path, lambda: pa.input_stream(packed, compression="zstd")))


def readable(path: str, read: Any) -> Any:
    """What `read()` returns; a DataError naming `path` where it cannot."""
    try:
        return read()
    except (OSError, EOFError, ValueError) as error:  # zlib and lzma raise the latter two
        raise DataError(f"data.path: {path} cannot be read: {error}") from error


def decoded(data: bytes, path: str) -> str:
    """UTF-8 text, its byte order mark removed. DataError with the place when it is not UTF-8."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: byte {error.start} is not UTF-8: {error.reason}", file=path) from error


def open_folder(data: TextSpec, allowed: str) -> Folder:
    """The place `data.path` names; `allowed` says in words what it may be. DataError when there is none."""
    if data.path is None:
        raise DataError(f"data.path: none given for {data.name}; allowed: {allowed}")
    try:
        filesystem, root = fsspec.core.url_to_fs(os.path.expanduser(data.path))
        exists = filesystem.exists(root)
    except (ImportError, ValueError, OSError) as error:
        raise DataError(f"data.path: cannot open {data.path!r}: {error}") from error
    if not exists:
        raise DataError(f"data.path: {data.path} does not exist; allowed: {allowed}")
    return Folder(filesystem, str(root))


def text_files(folder: Folder, include: Iterable[str], kinds: Iterable[Kind]) -> list[TextFile]:
    """Find the files of these kinds under a folder, by name; hidden ones are left out, links are followed. `include`
    holds patterns of file names (with a `/`: of paths), of which `.gz` and the like are no part; one file given itself
    needs none. DataError, all at once: links
    that lead nowhere."""
    allowed = set(kinds)
    if folder.filesystem.isfile(folder.root):
        file = _describe(folder, folder.filesystem.info(folder.root), folder.root.rsplit("/", 1)[0])
        return [file] if file.kind in allowed else []
    try:
        infos = _listed(folder)
    except OSError as error:
        raise DataError(f"data.path: cannot list {folder.root}: {error}") from error
    patterns = tuple(include)
    files, dangling = [], []
    for info in infos:
        name = str(info["name"]).removeprefix(folder.root).lstrip("/")
        if any(part.startswith(_HIDDEN) for part in name.split("/")):
            continue
        if base_name(name) in _NOT_DATA or not any(_matches(name, pattern) for pattern in patterns):
            continue
        if info.get("type") == "dangling":
            dangling.append(f"data.path: {info['name']} is a link to {os.readlink(info['name'])}, which does not exist")
        else:
            files.append(_describe(folder, info, folder.root))
    if dangling:
        raise DataError("\n".join(dangling), problems=dangling)
    return sorted((file for file in files if file.kind in allowed), key=lambda file: file.name)


def _matches(name: str, pattern: str) -> bool:
    known = name if "/" in pattern else base_name(name)
    return fnmatch(known, pattern) or fnmatch(_uncompressed(known), pattern)


def _uncompressed(name: str) -> str:
    """The name without `.gz` and the like."""
    return next((name[: -len(suffix)] for suffix in _COMPRESSED if name.lower().endswith(suffix)), name)


def _listed(folder: Folder) -> list[dict[str, Any]]:
    """List what lies under a folder, as the file system describes it."""
    if not isinstance(folder.filesystem, LocalFileSystem):
        return list(folder.filesystem.find(folder.root, detail=True).values())
    # fsspec does not go into linked folders.
    found = []
    for parent, folders, names in os.walk(folder.root, onerror=_raise, followlinks=True):
        # A link to a folder that it lies in would go on for ever.
        above = os.path.realpath(parent)
        folders[:] = [name for name in folders if not _contains(os.path.join(parent, name), above)]
        for name in names:
            path = os.path.join(parent, name)
            found.append(
                {"name": path, "type": "dangling" if os.path.islink(path) and not os.path.exists(path) else "file"}
            )
    return found


def _contains(link: str, path: str) -> bool:
    return os.path.islink(link) and os.path.commonpath([os.path.realpath(link), path]) == os.path.realpath(link)


def _raise(error: OSError) -> None:
    raise error


def _describe(folder: Folder, info: Any, root: str) -> TextFile:
    found = source_file(folder.filesystem, root, info, 0)
    return TextFile(found.path, found.name, found.size, found.stamp, kind_of(found.name))


def kind_of(name: str) -> Kind:
    """How a file is read, by its name; `.gz` and the like do not count."""
    return _KINDS.get(os.path.splitext(_uncompressed(name).lower())[1], "plain")


def by_split(files: list[TextFile]) -> dict[str, list[TextFile]]:
    """The files of each split the data itself has.

    Where some file or top folder is called train, files and top folders called validation (valid, val, dev) and
    test are those splits, and files called none of these are no data. Otherwise all files are `train`.
    """
    named: dict[str, list[TextFile]] = {}
    for file in files:
        match = _SPLIT_NAME.fullmatch(file.name.split("/", 1)[0])
        if match:
            split = next(name for name, group in zip(SPLITS, match.groups(), strict=True) if group)
            named.setdefault(split, []).append(file)
    return named if "train" in named else {"train": files}
