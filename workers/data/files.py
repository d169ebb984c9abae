"""Source files below a folder or bucket: open, list, identify."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from cache_store.errors import DataError
from workers.specs.experiment import ImageSpec


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
    if isinstance(filesystem, LocalFileSystem):
        status = os.stat(path)
        size, stamp = status.st_size, str(status.st_mtime_ns)
    else:
        keys = ("ETag", "etag", "md5Hash", "LastModified", "last_modified", "mtime", "updated", "created")
        size = int(info.get("size") or 0)
        stamp = next((str(info[key]) for key in keys if info.get(key) is not None), "")
    return SourceFile(path, path.removeprefix(root).lstrip("/"), size, stamp, rows, label)
