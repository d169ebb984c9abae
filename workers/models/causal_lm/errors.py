"""How this package refuses a model: one sentence, the setting it is about, what is allowed."""

from __future__ import annotations

from typing import Any

from cache_store.errors import ConfigError


def refuse(problem: str, where: str = "model", **details: Any) -> ConfigError:
    """A ConfigError for the setting `where`; raise what this returns."""
    return ConfigError(f"{where}: {problem}", where=where, **details)


def require(package: str, purpose: str, where: str) -> None:
    """ConfigError unless `package` can be imported."""
    from importlib.util import find_spec

    if find_spec(package) is None:
        raise refuse(f"{purpose} needs the package {package!r}, which is not installed: pip install {package}", where)
