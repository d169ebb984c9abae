"""Every error class that reaches a user, in one tree.

SegpropError                  exit code 1
├── UserError                 exit code 2: bad input; never retried
│   ├── ConfigError           the configuration (all problems of a file at once)
│   └── DataError             the data set: missing, corrupt, labels out of range
├── TrainingDiverged          a loss that is not finite; never retried
├── OutOfDeviceMemory         a GPU too small for a task, with half a micro-batch, too; never retried
├── OutOfHostMemory           a host too small for what a task keeps there; never retried
├── RunTaken                  another driver works on the run; the message says who and what to do
├── Interrupted               asked to stop; the state is checkpointed, the same command goes on
└── StoreError                storage and snapshots
    ├── StorageFull           no space left
    ├── StorageDenied         read-only or no permission
    ├── StorageUnavailable    a passing fault; worth a retry
    ├── CorruptRecord         a commit, set or checkpoint record that is not what it must be
    ├── MissingShard          no committed shard at that index
    └── CorruptShard          bytes that do not match their manifest (quarantined by the reader)
"""

# ruff: noqa: N818  names say what happened; they read the same in messages and summaries
from __future__ import annotations

from typing import Any


class SegpropError(Exception):
    """Base class. `details` are small JSON values; both survive pickling across processes."""

    exit_code = 1
    retryable = False

    def __init__(self, message: str, **details: Any) -> None:
        super().__init__(message)
        self.message = message
        self.details = details

    def __reduce__(self) -> tuple[Any, ...]:
        # Exception's own __reduce__ would drop keyword details when Ray ships the error to the driver.
        return _rebuild, (type(self), self.message, self.details)


def _rebuild(cls: type[SegpropError], message: str, details: dict[str, Any]) -> SegpropError:
    return cls(message, **details)


class UserError(SegpropError):
    exit_code = 2


class ConfigError(UserError):
    pass


class DataError(UserError):
    pass


class TrainingDiverged(SegpropError):
    pass


class OutOfDeviceMemory(SegpropError):
    pass


class OutOfHostMemory(SegpropError):
    pass


class Interrupted(SegpropError):
    pass


class RunTaken(SegpropError):
    pass


class StoreError(SegpropError):
    pass


class StorageFull(StoreError):
    pass


class StorageDenied(StoreError):
    pass


class StorageUnavailable(StoreError):
    retryable = True


class CorruptRecord(StoreError):
    pass


class MissingShard(StoreError):
    pass


class CorruptShard(StoreError):
    pass


def first_line(error: BaseException) -> str:
    """Shorten what a library said to fit into one of our sentences.

    Returns the first line, with the next one where the first only announces it ("Validation error for field 'x':"); the
    error's type where it said nothing. Of a KeyError, whose text is the key alone, type and key.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    if isinstance(error, KeyError):
        return f"{type(error).__name__}: {lines[0]}"
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
