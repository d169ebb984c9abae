"""Source files below a folder or bucket: open, list, identify."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import fsspec
from fsspec.implementations.local import LocalFileSystem

from cache_store.errors import DataError
from workers.file_digests import contents_digest
from workers.specs.experiment import ImageSpec


class Stamped(Protocol):
    """A file of a data set, as `files_fingerprint` looks at it; see `SourceFile`."""

    @property
    def path(self) -> str: ...
    @property
    def name(self) -> str: ...
    @property
    def size(self) -> int: ...
    @property
    def stamp(self) -> str | None: ...


@dataclass(frozen=True)
class SourceFile:
    """One file. `path` opens it, `name` is relative to the data set's folder, `rows` the samples it holds, `label` the
    class of an image file. `stamp`: what a remote file system changes when the file is rewritten (the ETag where there
    is one); None: a local file, which is identified by its content."""

    path: str
    name: str
    size: int
    stamp: str | None
    rows: int
    label: int = -1


def open_root(data: ImageSpec, allowed: str) -> tuple[Any, str]:
    """Open the file system of `data.path` and the path on it; DataError, saying what is `allowed`, when there is
    none."""
    if data.path is None:
        raise DataError(f"data.path: none given for {data.name}; allowed: {allowed}")
    path = os.path.expanduser(data.path)
    try:
        filesystem, root = fsspec.core.url_to_fs(path)
    except (ImportError, ValueError) as error:
        raise DataError(f"data.path: cannot open {data.path!r}: {error}") from error
    return filesystem, str(root)


def infos_of(filesystem: Any, folder: str) -> list[dict[str, Any]]:
    """List what lies in a folder, sorted by name; empty when it does not exist. Hidden names are left out.

    Symbolic links are described as what they lead to, under their own names. DataError naming those that lead nowhere.
    """
    try:
        infos = filesystem.ls(folder, detail=True)
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise DataError(f"data.path: cannot list {folder}: {error}") from error
    own = folder.rstrip("/")
    visible = [i for i in infos if not base_name(i["name"]).startswith(".") and i["name"].rstrip("/") != own]
    followed, problems = [], []
    for info in sorted(visible, key=lambda info: str(info["name"])):
        try:
            followed.append(filesystem.info(info["name"]) if info.get("islink") else info)
        except OSError as error:
            problems.append(f"data.path: the link {info['name']} leads nowhere ({error.strerror}); mend or remove it")
    if problems:
        raise DataError("\n".join(problems), problems=problems)
    return followed


def files_below(filesystem: Any, folder: str, above: tuple[str, ...] = ()) -> list[dict[str, Any]]:
    """List the files in a folder and in the folders inside it, as `infos_of` does; `above`: where the folders around it
    really lie. DataError when a link leads back to one of them."""
    real = os.path.realpath(folder) if isinstance(filesystem, LocalFileSystem) else folder
    if real in above:
        raise DataError(f"data.path: the link {folder} leads back to {real}, which holds it; remove it")
    found: list[dict[str, Any]] = []
    for info in infos_of(filesystem, folder):
        if info["type"] == "directory":
            found += files_below(filesystem, str(info["name"]), (*above, real))
        else:
            found.append(info)
    return found


def base_name(path: str) -> str:
    """Return the last component of a path."""
    return path.rstrip("/").rsplit("/", 1)[-1]


def join(folder: str, *names: str) -> str:
    """Join a path on any file system; empty names are left out."""
    return "/".join([folder.rstrip("/"), *[name for name in names if name]])


def source_file(filesystem: Any, root: str, info: Mapping[str, Any], rows: int, label: int = -1) -> SourceFile:
    """Describe a file as `infos_of` lists it, with its size and stamp."""
    path = str(info["name"])
    stamp: str | None = None
    if isinstance(filesystem, LocalFileSystem):
        size = os.stat(path).st_size
    else:
        keys = ("ETag", "etag", "md5Hash", "LastModified", "last_modified", "mtime", "updated", "created")
        size = int(info.get("size") or 0)
        stamp = next((str(info[key]) for key in keys if info.get(key) is not None), "")
    return SourceFile(path, path.removeprefix(root).lstrip("/"), size, stamp, rows, label)


def files_fingerprint(what: str, splits: Iterable[tuple[str, Iterable[Stamped]]]) -> str:
    """Return the sha256 (hex) of what a data set is: `what` its files are read as, and split, name and content of each.

    Local files count by their bytes, wherever and whenever they were written; remote ones by size and stamp, so that
    planning downloads nothing. DataError where one cannot be read."""
    digest = hashlib.sha256(what.encode())
    local: list[tuple[str, Path]] = []
    for split, files in splits:
        for file in files:
            if file.stamp is None:
                local.append((f"{split}/{file.name}", Path(file.path)))
            else:
                digest.update(f"\x1e{split}\x1f{file.name}\x1f{file.size}\x1f{file.stamp}".encode())
    if local:
        try:
            digest.update(f"\x1e{contents_digest(local)}".encode())
        except OSError as error:
            raise DataError(f"data.path: {error.filename} cannot be read: {error.strerror or error}") from error
    return digest.hexdigest()
