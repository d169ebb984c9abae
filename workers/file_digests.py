"""Identify files by their content: a sha256 of the whole file, remembered so that an unchanged file is read once.

The memory is a JSON file in the user's cache folder (`$XDG_CACHE_HOME/segprop/digests.json`, else `~/.cache/…`). A file
is taken for unchanged while device, inode, size, mtime and ctime are: a program can set mtime back after a write, ctime
it cannot. Files up to 16 MiB are remembered by folder, so that a data set of a million images takes one entry a class.
Losing the memory, or an entry to another process that saves at the same time, costs reading the files again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import threading
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from cache_store.errors import ConfigError, CorruptRecord, SegpropError
from cache_store.records.record_io import read_local
from cache_store.storage.durable import open_regular, write_atomically
from workers.user_cache import user_cache

_log = logging.getLogger("segprop.files")

#: Larger files have an entry of their own.
_LARGE = 16 << 20
#: Files younger than this may change again within one tick of the clock: they are not remembered.
_SETTLED_NS = 2_000_000_000
#: Entries kept, the latest used; each takes about 130 bytes.
_ENTRIES = 16_384
#: Seconds of reading after which it is said, and between two messages.
_QUIET_S = 5.0
_THREADS = 8
_FORMAT = 1


@dataclass(frozen=True)
class _File:
    name: str
    path: Path
    size: int
    #: Another one after every write.
    state: str
    #: When it was last written or its entry changed (unix nanoseconds).
    changed: int


def file_digest(path: Path) -> str:
    """Return the sha256 (hex) of a whole local file, read only where no earlier digest of it is remembered. OSError."""
    memory = _Memory()
    file = _stat(path.name, path)
    digest = _known_or_read(file, memory, _Progress(file.size))
    memory.save()
    return digest


def digest_of_setting(path: str | None, where: str) -> str | None:
    """Return the digest of a file that the setting `where` names; None where it names none. ConfigError when it cannot
    be read."""
    try:
        return None if path is None else file_digest(Path(path))
    except OSError as error:
        raise ConfigError(f"{where}: {path}: {error.strerror or error}", where=where, value=path) from error


def contents_digest(files: Iterable[tuple[str, Path]]) -> str:
    """Return one sha256 (hex) over the names and contents of local files, in any order; as `file_digest`. OSError."""
    found = sorted((_stat(name, path) for name, path in files), key=lambda file: file.name)
    memory, progress = _Memory(), _Progress(sum(file.size for file in found))
    groups: dict[str, list[_File]] = {}
    total = hashlib.sha256()
    for file in found:
        if file.size > _LARGE:
            total.update(f"\x1e{file.name}\x1f{_known_or_read(file, memory, progress)}".encode())
        else:
            groups.setdefault(os.path.dirname(file.name), []).append(file)
    for folder, members in groups.items():
        total.update(f"\x1e{folder}/\x1f{_group_digest(members, memory, progress)}".encode())
    memory.save()
    return total.hexdigest()


def _known_or_read(file: _File, memory: _Memory, progress: _Progress) -> str:
    digest = memory.get(file.state)
    if digest is None:
        digest = _read(file, progress)
        memory.put(file.state, digest, [file])
    else:
        progress.add(file.size)
    return digest


def _group_digest(members: Sequence[_File], memory: _Memory, progress: _Progress) -> str:
    """Digest small files of one folder, with one entry for all of them."""
    states = hashlib.sha256("\x1e".join(f"{file.name}\x1f{file.state}" for file in members).encode()).hexdigest()
    digest = memory.get(states)
    if digest is None:
        total = hashlib.sha256()
        with ThreadPoolExecutor(min(_THREADS, len(members))) as pool:
            for file, own in zip(members, pool.map(lambda one: _read(one, progress), members), strict=True):
                total.update(f"\x1e{os.path.basename(file.name)}\x1f{own}".encode())
        digest = total.hexdigest()
        memory.put(states, digest, members)
    else:
        progress.add(sum(file.size for file in members))
    return digest


def _read(file: _File, progress: _Progress) -> str:
    digest = hashlib.sha256()
    with open(open_regular(file.path), "rb") as stream:  # of a pipe nothing is waited for
        while piece := stream.read(1 << 22):
            digest.update(piece)
            progress.add(len(piece))
    return digest.hexdigest()


def _stat(name: str, path: Path) -> _File:
    status = os.stat(path)
    fields = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    return _File(name, path, status.st_size, ":".join(map(str, fields)), max(status.st_mtime_ns, status.st_ctime_ns))


class _Progress:
    """Says now and then how far reading is, once it takes seconds."""

    def __init__(self, total: int) -> None:
        self._total, self._done = total, 0
        self._lock = threading.Lock()
        self._next = time.monotonic() + _QUIET_S

    def add(self, count: int) -> None:
        with self._lock:
            self._done += count
            if time.monotonic() < self._next:
                return
            self._next = time.monotonic() + 2 * _QUIET_S
            done, total = self._done / 1e9, self._total / 1e9
        _log.warning("reading files once to identify them by content: %.1f of %.1f GB", done, total)


class _Memory:
    """State of a file (or of the small files of a folder) -> its digest, on this machine. Damaged: empty."""

    def __init__(self) -> None:
        self._path = user_cache("digests.json")
        self._used: dict[str, str] = {}
        self._new = False
        self._known = self._load()

    def get(self, state: str) -> str | None:
        digest = self._known.get(state)
        if digest is not None:
            self._used[state] = digest
        return digest

    def put(self, state: str, digest: str, files: Sequence[_File]) -> None:
        """Remember a digest, unless a file is young or was written while it was read."""
        settled = time.time_ns() - _SETTLED_NS
        with contextlib.suppress(OSError):
            if all(file.changed < settled and _stat(file.name, file.path).state == file.state for file in files):
                self._used[state] = digest
                self._new = True

    def save(self) -> None:
        """Write what is new, together with what other processes have written since; silent where that is impossible."""
        if not self._new:
            return
        kept = {state: digest for state, digest in self._load().items() if state not in self._used} | self._used
        body = {"format": _FORMAT, "digests": dict(list(kept.items())[-_ENTRIES:])}
        try:
            write_atomically(self._path, json.dumps(body).encode())
        except (OSError, SegpropError) as error:
            _log.debug("digests of files are not remembered: %s", error)

    def _load(self) -> dict[str, str]:
        try:
            content = read_local(self._path) or {}
            if content.get("format") != _FORMAT:
                return {}
            return {str(state): str(digest) for state, digest in content["digests"].items()}
        except (CorruptRecord, KeyError, AttributeError):
            return {}
