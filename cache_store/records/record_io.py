"""Write and read small JSON records that publish something: bounded, checked before use, created exclusively."""

from __future__ import annotations

import json
import re
import secrets
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import xxhash

from cache_store.errors import CorruptRecord, StoreError
from cache_store.storage.base import Storage
from cache_store.storage.durable import read_regular

MAX_RECORD_BYTES = 16 << 20
#: Of records that grow with a plan: 10^5 nodes take about 20 MB.
MAX_PLAN_BYTES = 128 << 20
_SEAL = re.compile(rb',"check":"([0-9a-f]{32})"}')
_SEAL_BYTES = len(',"check":""}') + 32
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,199}")


def new_attempt_id() -> str:
    """Make an id that no other attempt has; ids made later sort later (to the clock's precision)."""
    return f"{time.time_ns() // 1_000_000:011x}-{secrets.token_hex(6)}"


def is_name(name: str) -> bool:
    """Say whether `name` can be one component of a store path."""
    return _NAME.fullmatch(name) is not None


def check_name(name: str) -> str:
    """Return `name` if it can be one component of a store path; StoreError otherwise."""
    if not is_name(name):
        raise StoreError(f"{name!r} is not a name for the store: use letters, digits, '_', '.', '+', '-'")
    return name


def dump_record(record: Mapping[str, Any], what: str, limit: int = MAX_RECORD_BYTES) -> bytes:
    """Write a record as JSON bytes, with a checksum of themselves as the last key, `check`. StoreError when it is not
    JSON (NaN included) or longer than `limit` bytes."""
    try:
        data = json.dumps(record, allow_nan=False, separators=(",", ":")).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise StoreError(f"{what} is not JSON: {error}") from error
    data = data[:-1] + b',"check":"' + xxhash.xxh3_128_hexdigest(data).encode() + b'"}'
    if len(data) > limit:
        raise StoreError(f"{what} takes {len(data)} bytes; at most {limit} are allowed")
    return data


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is not JSON")


def parse_record(data: bytes, path: str, limit: int = MAX_RECORD_BYTES) -> dict[str, Any]:
    """Read the object in `data`, without its `check`. CorruptRecord when it is not a JSON object, longer than `limit`
    bytes, or does not match its checksum.

    Records without a checksum pass (older programs wrote none): compare the keys with `has_keys`, so that damage
    to the checksum's own name is found.
    """
    if len(data) > limit:
        raise CorruptRecord(f"{path} is longer than {limit} bytes", path=path)
    try:
        record = json.loads(data, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise CorruptRecord(f"{path} is not JSON: {error}", path=path) from error
    if not isinstance(record, dict):
        raise CorruptRecord(f"{path} is not a JSON object", path=path)
    if "check" in record:
        if not _sealed(data):
            raise CorruptRecord(f"{path} does not match its checksum", path=path)
        del record["check"]
    return record


def _sealed(data: bytes) -> bool:
    seal = _SEAL.fullmatch(data[-_SEAL_BYTES:])
    return seal is not None and xxhash.xxh3_128_hexdigest(data[:-_SEAL_BYTES] + b"}").encode() == seal.group(1)


def has_keys(record: Mapping[str, Any], keys: str) -> bool:
    """Say whether a record has exactly these keys, given with spaces in between."""
    return set(record) == set(keys.split())


def read_bounded(storage: Storage, path: str, limit: int = MAX_RECORD_BYTES) -> bytes | None:
    """Read the bytes of a record, cut just above `limit` (which `parse_record` refuses); None when absent."""
    try:
        return storage.read(path, limit=limit + 1)
    except FileNotFoundError:
        return None


def read_local(path: Path) -> dict[str, Any] | None:
    """Read the record at a path beside a store, such as a run directory's; None when absent.

    CorruptRecord for anything but a regular file with a JSON object of at most 16 MiB, as `parse_record`. Every record
    that a folder of the user's holds is read here: whatever lies there, nothing hangs and nothing grows.
    """
    try:
        data = read_regular(path, MAX_RECORD_BYTES + 1)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:  # ValueError: a path with a zero byte
        raise CorruptRecord(f"{path} cannot be read: {error}", path=str(path)) from error
    return parse_record(data, str(path))


def publish(storage: Storage, path: str, data: bytes, attempt: str, read: Callable[[], str | None]) -> bool:
    """Create the record at `path` exclusively; True when it is `attempt`'s, False when another attempt's
    counts.

    `read()` returns the attempt id of the valid record that is there, None when there is none. A creation
    that failed without an answer is read back: if a record is there, it decides, otherwise the failure is
    raised.
    """
    for last in (False, False, True):
        failure: StoreError | None = None
        try:
            if storage.create(path, data):
                return True
        except StoreError as error:
            failure = error
        winner = read()
        if winner is not None:
            return winner == attempt
        if failure is not None:
            raise failure
        # Somebody was first and the record is gone again (quarantined or dropped meanwhile): once more.
        if last:
            break
    raise StoreError(f"{path} keeps appearing and disappearing", path=path)
