"""What an address of a store says, and the rules that read one. Pure; nothing is opened.

An address never carries credentials: it is logged, shipped to workers and written to `config.yaml`. Which rule reads
which scheme is in the table of `cache_store.storage.open`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from cache_store.errors import UserError

_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,254}")


@dataclass(frozen=True)
class Address:
    """A store's place. `scheme`: as in `cache_store.storage.open.BACKENDS`; `bucket`: empty for folders and memory;
    `path`: the folder, or the prefix inside the bucket, without '/' at its end; `uri`: the one spelling of it all;
    `variables`: how the names of the environment variables begin that configure an object store."""

    scheme: str
    bucket: str
    path: str
    uri: str
    variables: str = ""


#: Reads a URI whose scheme is spelled right. UserError, never showing credentials, when the rest is not.
AddressRule = Callable[[str], Address]


def redacted(uri: str) -> str:
    """Return `uri` without what may be a secret: user information, query and fragment."""
    uri = re.sub(r"(//)[^/]*@", r"\1…@", uri)
    return re.sub(r"[?#].*$", "?…", uri) if "://" in uri else uri


def folder_address(uri: str) -> Address:
    """Read ``file:///absolute/folder``."""
    _, _, rest = uri.partition("://")
    if not rest.startswith("/"):
        raise UserError(f"{redacted(uri)!r}: write file:///absolute/folder, or just the folder's path")
    return Address("file", "", rest, uri)


def name_address(uri: str) -> Address:
    """Read ``scheme://name``, which lies in no bucket."""
    scheme, _, rest = uri.partition("://")
    return Address(scheme, "", rest.strip("/"), uri)


def bucket_address(uri: str, *, variables: str) -> Address:
    """Read ``scheme://bucket/prefix``. `variables`: as in `Address`."""
    scheme, _, rest = uri.partition("://")
    shown = repr(redacted(uri))
    if "@" in rest.split("/", 1)[0] or "?" in rest or "#" in rest:
        raise UserError(
            f"{shown}: an address holds no credentials and no options; allowed: {scheme}://bucket/prefix, with the "
            f"rest in environment variables ({variables}…)"
        )
    bucket, _, prefix = rest.partition("/")
    prefix = prefix.removesuffix("/")
    parts = prefix.split("/") if prefix else []
    if not _BUCKET.fullmatch(bucket) or "\\" in prefix or any(part in ("", ".", "..") for part in parts):
        raise UserError(f"{shown}: not a bucket and a prefix; allowed: {scheme}://bucket/prefix")
    return Address(scheme, bucket, prefix, f"{scheme}://{bucket}/{prefix}".rstrip("/"), variables)
