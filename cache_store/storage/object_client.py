"""The obstore client behind an object store's address. The only module that imports obstore."""

from __future__ import annotations

import importlib
import ipaddress
import os
import re
from datetime import timedelta
from typing import Any
from urllib.parse import urlsplit

from cache_store.errors import ConfigError
from cache_store.storage.addresses import Address, redacted
from cache_store.storage.retry import RetryPolicy

_CLASSES = {"s3": "S3Store", "gs": "GCSStore", "az": "AzureStore"}
#: Retries of one part inside a multipart upload, on top of `RetryPolicy`, which would begin the upload anew.
_PART_RETRIES = 3
#: Variables that hold an address; others of the name say how endpoints are chosen.
_ENDPOINT = re.compile(r"ENDPOINT(_URL(_[A-Z0-9]+)?)?$")
_HOST = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?")


def load_obstore() -> Any:
    """Import the obstore package. ConfigError when it is not installed."""
    try:
        return importlib.import_module("obstore")
    except ImportError as error:
        raise ConfigError(
            "object stores need the package obstore, which is not installed: pip install 'segprop[s3]'"
        ) from error


def endpoint_of(address: Address) -> tuple[str, ...]:
    """Return the settings that say which server answers for `address`."""
    variables = address.variables
    names = sorted(
        name for name in os.environ if name.startswith(variables) and ("ENDPOINT" in name or "ACCOUNT" in name)
    )
    return tuple(f"{name}={os.environ[name]}" for name in names if "KEY" not in name)


def check_endpoints(address: Address) -> None:
    """ConfigError when a variable that names the server of `address` holds no http address: obstore would panic at the
    first request."""
    for setting in endpoint_of(address):
        name, _, value = setting.partition("=")
        if _ENDPOINT.search(name) and "_USE_" not in name and value and not _is_http(value):
            raise ConfigError(
                f"{address.uri}: the environment variable {name} is no address of a server: {redacted(value)!r}; "
                "allowed: https://host or https://host:port",
                where=name,
            )


def _is_http(text: str) -> bool:
    try:
        parts = urlsplit(text)
        host, port = parts.hostname or "", parts.port
        literal = "[" in parts.netloc and ipaddress.IPv6Address(host) is not None
    except ValueError:
        return False
    named = literal or _HOST.fullmatch(host) is not None
    return parts.scheme in ("http", "https") and named and port != 0 and text.isascii() and not re.search(r"\s", text)


def make_client(address: Address, patience: RetryPolicy, *, retry_parts: bool = False) -> Any:
    """Make an obstore store at `address`; credentials, endpoint and region are read from the environment.

    It never retries by itself (our own retries know what is safe to repeat), except, with `retry_parts`, inside
    multipart uploads. ConfigError when obstore is missing, refuses the settings, or is given no address of a server.
    """
    load_obstore()
    check_endpoints(address)
    kind = getattr(importlib.import_module("obstore.store"), _CLASSES[address.scheme])
    variables = address.variables
    # Given any client options, obstore no longer reads this one from the environment.
    plain = os.environ.get(f"{variables}ALLOW_HTTP", "").lower() in ("1", "true", "yes", "on")
    try:
        return kind(
            address.bucket,
            prefix=address.path or None,
            client_options={
                "timeout": timedelta(seconds=patience.request_s),
                "connect_timeout": timedelta(seconds=min(10.0, patience.request_s)),
                "allow_http": plain,
            },
            retry_config={
                "max_retries": _PART_RETRIES if retry_parts else 0,
                "retry_timeout": timedelta(seconds=patience.request_s),
            },
        )
    except Exception as error:  # noqa: BLE001  obstore's errors have no common base but Exception
        # Not the error's own text: it may quote a setting, and settings may be secret.
        raise ConfigError(
            f"{address.uri}: the settings of this storage are not usable ({type(error).__name__}); check the "
            f"environment variables {variables}…"
        ) from None
