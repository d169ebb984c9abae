"""Write lists of parts as people read them: `layer0–layer19` instead of twenty names."""

from __future__ import annotations

import re
from collections.abc import Sequence

#: A run of fewer is clearer written out.
SHORTEST_RUN = 3


def abbreviated(parts: Sequence[str]) -> list[str]:
    """Return `parts` in their order, every run of at least three names that only count up as `first–last`."""
    shown: list[str] = []
    for run in rows_of_layers(parts):
        shown += run if len(run) < SHORTEST_RUN else [f"{run[0]}–{run[-1]}"]
    return shown


def in_order(parts: Sequence[str]) -> list[str]:
    """Sort as one counts: `layer2` before `layer10`."""
    return sorted(parts, key=lambda part: (_split(part)[0], _split(part)[1] or 0, part))


def follows(first: str, second: str) -> bool:
    """Tell whether `second` is the next after `first` (`layer3`, `layer4`)?"""
    (stem, number), (other, after) = _split(first), _split(second)
    return number is not None and stem == other and after == number + 1


def rows_of_layers(parts: Sequence[str]) -> list[list[str]]:
    """Put layers that follow each other together; every other part stands alone."""
    runs: list[list[str]] = []
    for part in parts:
        # ResNet segments are few and their names are the publication's.
        if runs and part.startswith("layer") and follows(runs[-1][-1], part):
            runs[-1].append(part)
        else:
            runs.append([part])
    return runs


def _split(part: str) -> tuple[str, int | None]:
    found = re.fullmatch(r"(.*?)([0-9]+)", part)
    return (part, None) if found is None else (found[1], int(found[2]))
