"""Write out `memory: auto`, wherever a raw configuration says it: the one place that knows what it stands for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from workers.specs.memory import AUTO

_SECTION = "memory"


def write_out(raw: dict[str, Any]) -> None:
    """Replace every `memory: auto`, in place, by the entries that it means. What is no section is left for the checks
    that follow."""
    for holder in _holders(raw):
        if holder.get(_SECTION) == AUTO:
            holder[_SECTION] = {"optimizer": AUTO, "frozen": AUTO, "activations": AUTO}


def _holders(raw: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """What may have a section `memory`: the file, its regimes, and their stages."""
    yield raw
    for regime in _sections(raw.get("regimes")):
        yield regime
        yield from _sections(regime.get("stages"))


def _sections(named: Any) -> Iterator[dict[str, Any]]:
    if isinstance(named, dict):
        yield from (value for value in named.values() if isinstance(value, dict))
