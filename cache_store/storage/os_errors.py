"""What an OS error means for a store: full, denied, a passing fault, or something else."""

from __future__ import annotations

import errno

from cache_store.errors import StorageDenied, StorageFull, StorageUnavailable, StoreError

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_DENIED = {errno.EACCES, errno.EPERM, errno.EROFS}
_PASSING = {
    errno.EAGAIN,
    errno.EBUSY,
    errno.ECONNABORTED,
    errno.ECONNRESET,
    errno.EHOSTUNREACH,
    errno.EINTR,
    errno.EIO,
    errno.EMFILE,
    errno.ENETDOWN,
    errno.ENETUNREACH,
    errno.ENFILE,
    errno.ENOLCK,
    errno.ENOMEM,
    errno.EPIPE,
    errno.ESTALE,
    errno.ETIMEDOUT,
}


def typed_error(error: OSError, doing: str, where: str) -> StoreError:
    """Return the StoreError that says what `error` means for the store: full, denied, passing fault, or other."""
    code = error.errno
    reason = error.strerror or str(error) or type(error).__name__
    text = f"cannot {doing} {where}: {reason}"
    if code in _FULL:
        return StorageFull(f"{text}; free some space and run again", path=where, errno=code)
    if code in _DENIED:
        return StorageDenied(f"{text}; it must be writable by this user", path=where, errno=code)
    if code in _PASSING or isinstance(error, TimeoutError):
        return StorageUnavailable(text, path=where, errno=code)
    return StoreError(text, path=where, errno=code)
