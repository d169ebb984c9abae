"""Keep the files of a benchmark as one: what a run asks then lies in its store, for workers anywhere and later runs."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterable
from pathlib import Path

from cache_store.errors import CorruptShard
from workers.file_digests import contents_digest

#: Of the commit of a node that keeps questions.
QUESTIONS_FILE = "questions.zip"


def fingerprint(data: Path, files: Iterable[Path]) -> str:
    """Identify files below `data` by their names there and their contents. OSError."""
    return contents_digest((file.relative_to(data).as_posix(), file) for file in files)


def pack(data: Path, files: Iterable[Path]) -> bytes:
    """Return files below `data` as one: the same bytes for the same files. OSError."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for file in sorted(files):
            # With a date of its own a file would be another one on every machine.
            archive.writestr(zipfile.ZipInfo(file.relative_to(data).as_posix()), file.read_bytes())
    return stream.getvalue()


def unpack(packed: bytes, folder: Path) -> None:
    """Write the files below `folder`. CorruptShard for what `pack` did not write."""
    try:
        with zipfile.ZipFile(io.BytesIO(packed)) as archive:
            archive.extractall(folder)
    except zipfile.BadZipFile as error:
        raise CorruptShard(f"{QUESTIONS_FILE}: holds no questions: {error}") from error
