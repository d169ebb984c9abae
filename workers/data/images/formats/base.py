"""Where the samples of a data set lie: `ImageFiles`, its fingerprint, and looking at the folders of any file system.

Every format has a module that finds its files and returns a `ImageFiles`: `digits`, `cifar`, `class_folders`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from cache_store.errors import DataError
from workers.data.files import SourceFile
from workers.data.images.facts import SPLITS, Split


@dataclass(frozen=True)
class ImageFiles:
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


def fail(problems: Iterable[str]) -> None:
    """One DataError of all problems; nothing when there are none."""
    lines = list(problems)
    if lines:
        raise DataError("\n".join(lines), problems=lines)
