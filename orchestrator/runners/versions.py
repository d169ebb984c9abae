"""Tell whether driver and workers are the same program, by versions and a digest of our own code.

Node ids, commits and formats mean the same only to the same code; numbers are the same only with the same torch.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

import xxhash

PACKAGES = ("ray", "torch", "transformers")
CODE = ("segprop", "orchestrator", "workers", "cache_store")


def versions() -> dict[str, str]:
    """Return what of this process has to be the same everywhere. Imports none of the packages."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    try:
        version = metadata.version("segprop")
    except metadata.PackageNotFoundError:
        version = "?"  # a working directory that travelled with a job
    return {**found, "segprop": f"{version} (code {code_digest()})"}


def code_digest() -> str:
    """Return 8 hex digits that stand for the source files of our packages, wherever they lie."""
    root = Path(__file__).resolve().parents[2]
    digest = xxhash.xxh3_64()
    for package in CODE:
        for path in sorted((root / package).rglob("*.py")):
            digest.update(path.relative_to(root).as_posix().encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()[:8]


def differences(driver: Mapping[str, str], worker: Mapping[str, str]) -> list[str]:
    """List what differs, as `torch 2.15.0 here, 2.14.1 there`."""
    return [
        f"{name} {driver.get(name, 'absent')} here, {worker.get(name, 'absent')} there"
        for name in dict.fromkeys((*driver, *worker))
        if not _same(name, driver.get(name), worker.get(name))
    ]


def _same(name: str, ours: str | None, theirs: str | None) -> bool:
    if name == "segprop" and ours and theirs and "?" in (ours[0], theirs[0]):
        # Without an installed package on one side the code alone decides.
        return ours.partition(" ")[2] == theirs.partition(" ")[2]
    return ours == theirs
