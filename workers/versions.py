"""Versions of installed packages that compute: part of what a result is known by."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from importlib.metadata import PackageNotFoundError, version


def installed(packages: Iterable[str]) -> dict[str, str]:
    """Map each installed package to its version, without the build (`2.8.0` for `2.8.0+cu128`): machines of one run
    may hold builds for different devices, which is no other version of the computation. Loads none of them."""
    found = {package: _version(package) for package in packages}
    return {package: number for package, number in found.items() if number is not None}


@cache
def _version(package: str) -> str | None:
    try:
        return version(package).partition("+")[0]
    except PackageNotFoundError:
        return None
