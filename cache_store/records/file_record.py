"""Describe a file that a record publishes: path, length and checksums, and their form in JSON."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cache_store.records.record_io import is_name

_HEX = re.compile(r"[0-9a-f]+")


@dataclass(frozen=True)
class FileRecord:
    """One file a record publishes. `path` from the storage root, `bytes` its length, `xxh3` the xxh3_128 and `sha256`
    the sha256 of its bytes in lower-case hex."""

    path: str
    bytes: int
    xxh3: str
    sha256: str

    def to_json(self) -> dict[str, Any]:
        return {"path": self.path, "bytes": self.bytes, "xxh3": self.xxh3, "sha256": self.sha256}


def valid_digests(size: Any, xxh3: Any, sha256: Any) -> bool:
    """Say whether these can be the length, xxh3_128 and sha256 of a file."""
    return (
        type(size) is int
        and size >= 0
        and isinstance(xxh3, str)
        and len(xxh3) == 32
        and _HEX.fullmatch(xxh3) is not None
        and isinstance(sha256, str)
        and len(sha256) == 64
        and _HEX.fullmatch(sha256) is not None
    )


def files_to_json(files: Mapping[str, FileRecord]) -> dict[str, Any]:
    """Write the files of a record as JSON values, by name."""
    return {name: file.to_json() for name, file in files.items()}


def read_files(files: Any, folder: str) -> dict[str, FileRecord] | None:
    """Read what `files_to_json` wrote. None unless it maps names to records of files of these names in `folder`."""
    if not isinstance(files, dict):
        return None
    for name, record in files.items():
        if not (
            isinstance(record, dict)
            and set(record) == {"path", "bytes", "xxh3", "sha256"}
            and is_name(name)
            and record["path"] == f"{folder}/{name}"
            and valid_digests(record["bytes"], record["xxh3"], record["sha256"])
        ):
            return None
    return {name: FileRecord(**record) for name, record in files.items()}
