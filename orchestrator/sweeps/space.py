"""Choose which values a sweep tries. Pure: the section alone decides, so a sweep that is run again tries the same."""

from __future__ import annotations

import itertools
import json
import math
import random
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from cache_store.keys import digest_json
from orchestrator.config.sweep_schema import Draw, SweepConfig

#: More trials than anybody reads the table of, and than one driver's plan should hold.
MOST_TRIALS = 1000
#: Characters of a trial's folder.
_MOST_CHARACTERS = 80

Point = dict[str, Any]


def count(section: SweepConfig) -> int:
    """Count the points before equal ones are merged."""
    grids = math.prod(len(draw.grid) for draw in section.parameters.values() if draw.grid is not None)
    return grids * section.samples


def points(section: SweepConfig) -> list[Point]:
    """Return every trial's parameters, each combination once.

    A draw depends on the seed, the key and its number alone: every point of the grid meets the same draws, so that
    they are compared like with like (and share more stages), and more samples leave the first ones as they are."""
    grids = {key: draw.grid for key, draw in section.parameters.items() if draw.grid is not None}
    found: dict[str, Point] = {}
    for sample in range(section.samples):
        drawn = {
            key: draw_value(draw, random.Random(f"{section.seed}/{sample}/{key}"))
            for key, draw in section.parameters.items()
            if draw.grid is None
        }
        for combination in itertools.product(*grids.values()):
            chosen = {**dict(zip(grids, combination, strict=True)), **drawn}
            point = {key: chosen[key] for key in section.parameters}
            found.setdefault(json.dumps(point, sort_keys=True), point)
    return list(found.values())


def draw_value(draw: Draw, source: random.Random) -> Any:
    """Draw one value of a parameter that is not a grid."""
    return _DRAWS[draw.kind](source, draw.values)


def _uniform(source: random.Random, bounds: Sequence[float]) -> float:
    return _four_digits(source.uniform(*bounds), bounds)


def _loguniform(source: random.Random, bounds: Sequence[float]) -> float:
    return _four_digits(math.exp(source.uniform(*map(math.log, bounds))), bounds)


def _four_digits(value: float, bounds: Sequence[float]) -> float:
    """Round to what a table shows and a person types again, within the bounds."""
    low, high = bounds
    return min(max(float(f"{value:.4g}"), low), high)


_DRAWS: Mapping[str, Callable[[random.Random, Sequence[Any]], Any]] = {
    "choice": lambda source, values: source.choice(values),
    "uniform": _uniform,
    "loguniform": _loguniform,
    "randint": lambda source, bounds: source.randrange(*bounds),
}


def short_keys(keys: list[str]) -> dict[str, str]:
    """Shorten each dotted key to its last words, as many as tell it from the others."""
    short: dict[str, str] = {}
    for key in keys:
        words = key.split(".")
        for length in range(1, len(words) + 1):
            tail = words[-length:]
            if not any(other != key and other.split(".")[-length:] == tail for other in keys):
                break
        short[key] = ".".join(tail)
    return short


def point_text(point: Mapping[str, Any], between: str = " ") -> str:
    """Write a point as `base=1 head=0 lr=0.00031`."""
    short = short_keys(list(point))
    return between.join(f"{short[key]}={value_text(value)}" for key, value in point.items())


def value_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def folder_name(point: Mapping[str, Any]) -> str:
    """Name a folder that is the same whatever else the sweep tries: `base=1,head=0`."""
    text = point_text(point, ",")
    name = re.sub(r"[^A-Za-z0-9._=,-]+", "_", text)
    if name == text and len(name) <= _MOST_CHARACTERS:
        return name
    return f"{name[: _MOST_CHARACTERS - 9]}-{digest_json(dict(point))[:8]}"
