"""A folder of this process's own inside a local one. What processes that were killed left there goes when the next one
comes: each holds a lock beside its folder as long as it lives."""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import shutil
from pathlib import Path
from types import TracebackType


class OwnFolder:
    """A new, empty folder `path`, removed by `close` or at the end of a `with`."""

    def __init__(self, parent: Path, prefix: str) -> None:
        """`prefix`: of its name, which tells such folders from others. OSError where nothing can be written there."""
        parent.mkdir(parents=True, exist_ok=True)
        _sweep(parent, prefix)
        self.path, self._lock = _claimed(parent, prefix)

    def __enter__(self) -> Path:
        return self.path

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Remove it."""
        if self._lock < 0:
            return
        _remove(self.path)
        os.close(self._lock)
        self._lock = -1


def _claimed(parent: Path, prefix: str) -> tuple[Path, int]:
    """Make a folder, and the lock beside it that lives as long as this process."""
    while True:
        path = parent / f"{prefix}{secrets.token_hex(8)}"
        lock = _locked(_lock_of(path), os.O_CREAT | os.O_EXCL)
        if lock is not None:
            path.mkdir(mode=0o700)
            return path, lock


def _sweep(parent: Path, prefix: str) -> None:
    """Remove folders whose process is gone. Those of other users stay, and whatever else has such a name."""
    for each in parent.glob(f"{prefix}*.lock"):
        with contextlib.suppress(OSError):
            lock = _locked(each, 0)
            if lock is None:
                continue
            try:
                _remove(each.with_suffix(""))
            finally:
                os.close(lock)


def _lock_of(path: Path) -> Path:
    return path.with_suffix(".lock")


def _remove(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)
    with contextlib.suppress(FileNotFoundError):
        _lock_of(path).unlink()


def _locked(path: Path, flags: int) -> int | None:
    """Open a file and lock it; None where another process has it, or removed it on the way."""
    try:
        file = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | flags, 0o600)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(file)
        return None
    if not os.fstat(file).st_nlink:
        os.close(file)
        return None
    return file
