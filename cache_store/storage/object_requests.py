"""Requests to an object store: each one bounded in time, repeated while it fails in passing, its errors typed."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable
from typing import Any, TypeVar

from cache_store.storage.addresses import Address
from cache_store.storage.object_client import endpoint_of, load_obstore, make_client
from cache_store.storage.object_errors import Fault, Kind, fault_of
from cache_store.storage.retry import RetryPolicy

T = TypeVar("T")


class NoRanges(Exception):  # noqa: N818  never leaves this folder
    """The server does not answer ranges as it must."""


class WrongLength(Exception):  # noqa: N818  never leaves this folder
    """What arrived, or was stored, has another length than it must have."""


class ObjectRequests:
    """The client of one address. `api` is obstore; `client` serves everything but uploads in parts, which `uploads`
    does; `faults` is what both raise; `endpoint` says which server answers."""

    def __init__(self, address: Address, patience: RetryPolicy | None) -> None:
        self._address = address
        self._patience = patience or RetryPolicy.from_environment()
        self.endpoint = (address.uri, *endpoint_of(address))
        self.api = load_obstore()
        self.faults = (self.api.exceptions.BaseError, OSError, ValueError)
        self.client = make_client(address, self._patience)
        self.uploads = make_client(address, self._patience, retry_parts=True)

    def name(self, path: str) -> str:
        """Return the URI of a path, for messages."""
        return f"{self._address.uri}/{path}" if path else self._address.uri

    def call(self, doing: str, path: str, call: Callable[[], T]) -> T:
        """Return `call()`, an idempotent request, repeated while it fails in passing. FileNotFoundError, NoRanges, and
        StoreErrors: why it fails for good."""
        ends = time.monotonic() + self._patience.total_s
        tries = 0
        waits = self._patience.waits()
        while True:
            tries += 1
            try:
                return call()
            except WrongLength as error:
                fault = Fault(Kind.PASSING, 0, "", str(error))
            except self.faults as error:
                fault = fault_of(error)
            wait = next(waits, None)
            if fault.kind is not Kind.PASSING or wait is None or time.monotonic() + wait > ends:
                raise self.error(fault, doing, path, tries)
            time.sleep(wait)

    def error(self, fault: Fault, doing: str, path: str, tries: int = 1) -> Exception:
        """Return what to raise for `fault`."""
        if fault.kind is Kind.NO_RANGES:
            return NoRanges()
        if fault.kind is Kind.ABSENT:
            return FileNotFoundError(errno.ENOENT, "not in the store", path)
        return fault.error(doing, self.name(path), self._address.variables, tries)

    def head(self, doing: str, path: str) -> Any:
        """Ask what the server says of an object: `size`, `e_tag`."""
        return self.call(doing, path, lambda: self.api.head(self.client, path))

    def size(self, path: str) -> int:
        """Ask how many bytes an object has."""
        return int(self.head("look up", path)["size"])

    def create(self, path: str, data: bytes, found: Callable[[], bytes | None]) -> bool:
        """Put `data` where nothing is; False when something is. `found` reads what is there: a request may have been
        carried out although its reply was lost, and equal bytes mean that it was ours."""
        ends = time.monotonic() + self._patience.total_s
        unclear = False
        tries = 0
        waits = self._patience.waits()
        while True:
            tries += 1
            try:
                self.api.put(self.client, path, data, mode="create", use_multipart=False)
                return True
            except self.faults as error:
                fault = fault_of(error)
            if fault.kind is Kind.EXISTS and not unclear:
                return False
            if fault.kind not in (Kind.EXISTS, Kind.PASSING):
                raise self.error(fault, "create", path, tries)
            # An earlier try, or this one, may have been carried out without our hearing of it.
            unclear = True
            present = found()
            if present is not None:
                return present == data
            wait = next(waits, None)
            if wait is None or time.monotonic() + wait > ends:
                raise self.error(fault, "create", path, tries)
            time.sleep(wait)
