"""Open the storage at an address: one table says, by scheme, how an address is read and what serves it.

To add a kind of storage: subclass `Storage`, write the rule that reads its addresses, and add a row to `BACKENDS`;
`tests/integration/storage/test_storage_contract.py` then says whether it keeps the contract.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from cache_store.errors import StorageUnavailable, UserError
from cache_store.storage.addresses import Address, AddressRule, bucket_address, folder_address, name_address, redacted
from cache_store.storage.base import MARKER, Storage

_SCHEME = re.compile(r"^([A-Za-z][A-Za-z0-9+.-]*):/")


@dataclass(frozen=True)
class Backend:
    """A kind of storage. `form` shows how its addresses are written, for messages; `address` reads one; `make` returns
    the storage there without touching it, and imports the package it needs only then."""

    form: str
    address: AddressRule
    make: Callable[[Address], Storage]
    #: Whether no other process sees it.
    private: bool = False


def _local(address: Address) -> Storage:
    from cache_store.storage.local import LocalStorage

    return LocalStorage(address.path)


def _memory(address: Address) -> Storage:
    from cache_store.storage.memory import MemoryStorage

    return MemoryStorage(address)


def _object_store(address: Address) -> Storage:
    from cache_store.storage.object_store import ObjectStorage

    return ObjectStorage(address)


#: By scheme. The environment variables of an object store begin as its address rule says.
BACKENDS = {
    "file": Backend("file:///folder", folder_address, _local),
    "memory": Backend("memory://name", name_address, _memory, private=True),
    "s3": Backend("s3://bucket/prefix", partial(bucket_address, variables="AWS_"), _object_store),
    "gs": Backend("gs://bucket/prefix", partial(bucket_address, variables="GOOGLE_"), _object_store),
    "az": Backend("az://container/prefix", partial(bucket_address, variables="AZURE_"), _object_store),
}


def parse_address(uri: str) -> Address:
    """Read the address that `uri` spells. UserError, never showing credentials, when it is none or is not allowed."""
    shown = repr(redacted(uri))
    if not uri:
        raise UserError(f"the store's address is empty; allowed: {_allowed()}")
    if "::" in uri or "\0" in uri:
        raise UserError(f"{shown}: chained addresses are not allowed; allowed: {_allowed()}")
    match = _SCHEME.match(uri)
    if match is None:
        return Address("file", "", uri, uri)
    scheme = match.group(1).lower()
    if not uri.startswith(f"{scheme}://") or scheme not in BACKENDS:
        raise UserError(f"{shown}: this storage is not supported; allowed: {_allowed()}")
    return BACKENDS[scheme].address(uri)


def _allowed() -> str:
    return ", ".join(["a folder path", *(backend.form for backend in BACKENDS.values())])


def is_private(uri: str) -> bool:
    """Tell whether the storage at an address is this process's alone. UserError as `parse_address`."""
    return BACKENDS[parse_address(uri).scheme].private


def open_storage(uri: str) -> Storage:
    """Open the storage at `uri`: a folder path, ``file:///folder``, ``s3://bucket/prefix``, ``gs://…``, ``az://…``
    (see docs/storage.md) or ``memory://name`` (this process only, for tests).

    Creates the root if needed. The first use probes that it can be written, that exclusive creation really
    is exclusive and that what was written is there at once, then leaves ``store.json``; later uses of a
    folder only read that marker, object stores are probed once a process.
    UserError: unknown scheme, not a folder, or a store of another format version. ConfigError: the package
    for this kind of storage is not installed. StorageDenied, StorageFull, StorageUnavailable, StoreError:
    the root cannot be used, with the reason.
    """
    storage = _construct(uri)
    storage.probe()
    return storage


def existing_storage(uri: str, *, repair: bool = False) -> Storage:
    """Open a store that is already there, to look after it: probes and creates nothing; with `repair` a damaged marker
    is written again. UserError when there is none."""
    storage = _construct(uri)
    if repair:
        storage.restore_marker()
    if not storage.is_store():
        raise UserError(f"{storage.uri}: there is no store here (it has no {MARKER})")
    return storage


def running_storage(uri: str) -> Storage:
    """Open the store of a run that has begun. Makes nothing where it is gone: its volume may have been unmounted, and
    what was made in its place would lie under the mount point. StorageUnavailable when it is not there; otherwise as
    `open_storage`."""
    storage = _construct(uri)
    if not storage.is_store():
        raise StorageUnavailable(
            f"{storage.uri}: the store of this run is not there (it has no {MARKER}); is its volume mounted?",
            path=storage.uri,
        )
    if storage.remote:
        storage.probe()
    return storage


def _construct(uri: str) -> Storage:
    address = parse_address(uri)
    return BACKENDS[address.scheme].make(address)
