"""Where a store is: a folder, or a URI of a known kind. Pure; nothing is opened.

An address never carries credentials: it is logged, shipped to workers and written to `config.yaml`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from cache_store.errors import UserError

_SCHEME = re.compile(r"^([A-Za-z][A-Za-z0-9+.-]*):/")
_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,254}")

#: Object stores, by scheme: the environment variables that configure each begin with this.
OBJECT_SCHEMES = {"s3": "AWS_", "gs": "GOOGLE_", "az": "AZURE_"}
ALLOWED = "a folder path, file:///folder, memory://name, s3://bucket/prefix, gs://bucket/prefix, az://container/prefix"


@dataclass(frozen=True)
class Address:
    """A store's place. `scheme`: file, memory, s3, gs or az; `bucket`: empty for folders and memory; `path`:
    the folder, or the prefix inside the bucket, without '/' at its end; `uri`: the one spelling of it all."""

    scheme: str
    bucket: str
    path: str
    uri: str


def redacted(uri: str) -> str:
    """`uri` without what may be a secret: user information, query and fragment."""
    uri = re.sub(r"(//)[^/]*@", r"\1…@", uri)
    return re.sub(r"[?#].*$", "?…", uri) if "://" in uri else uri


def parse_address(uri: str) -> Address:
    """The address `uri` spells. UserError, never showing credentials, when it is none or is not allowed."""
    shown = repr(redacted(uri))
    if not uri:
        raise UserError(f"the store's address is empty; allowed: {ALLOWED}")
    if "::" in uri or "\0" in uri:
        raise UserError(f"{shown}: chained addresses are not allowed; allowed: {ALLOWED}")
    match = _SCHEME.match(uri)
    if match is None:
        return Address("file", "", uri, uri)
    scheme = match.group(1).lower()
    if not uri.startswith(f"{scheme}://"):
        raise UserError(f"{shown}: this storage is not supported; allowed: {ALLOWED}")
    rest = uri[len(scheme) + 3 :]
    if scheme == "file":
        if not rest.startswith("/"):
            raise UserError(f"{shown}: write file:///absolute/folder, or just the folder's path")
        return Address("file", "", rest, uri)
    if scheme == "memory":
        return Address("memory", "", rest.strip("/"), uri)
    if scheme not in OBJECT_SCHEMES:
        raise UserError(f"{shown}: this storage is not supported; allowed: {ALLOWED}")
    return _object_address(scheme, rest, shown)


def _object_address(scheme: str, rest: str, shown: str) -> Address:
    if "@" in rest.split("/", 1)[0] or "?" in rest or "#" in rest:
        raise UserError(
            f"{shown}: an address holds no credentials and no options; allowed: {scheme}://bucket/prefix, with the "
            f"rest in environment variables ({OBJECT_SCHEMES[scheme]}…)"
        )
    bucket, _, prefix = rest.partition("/")
    prefix = prefix.removesuffix("/")
    parts = prefix.split("/") if prefix else []
    if not _BUCKET.fullmatch(bucket) or "\\" in prefix or any(part in ("", ".", "..") for part in parts):
        raise UserError(f"{shown}: not a bucket and a prefix; allowed: {scheme}://bucket/prefix")
    return Address(scheme, bucket, prefix, f"{scheme}://{bucket}/{prefix}".rstrip("/"))
