"""Which values a sweep tries. Pure: the section alone decides, so a sweep that is run again tries the same."""

from __future__ import annotations

import itertools
import json
import math
import random
import re
from collections.abc import Mapping
from typing import Any

from cache_store.keys import digest_json
from orchestrator.config.sweep_schema import Draw, SweepConfig

#: More trials than anybody reads the table of, and than one driver's plan should hold.
MOST_TRIALS = 1000
#: Characters of a trial's folder.
_MOST_CHARACTERS = 80

Point = dict[str, Any]


def count(section: SweepConfig) -> int:
    """Points before equal ones are merged."""
    grids = math.prod(len(draw.values) for draw in section.parameters.values() if draw.kind == "grid")
    return grids * section.samples


def points(section: SweepConfig) -> list[Point]:
    """Every trial's parameters, each combination once.

    A draw depends on the seed, the key and its number alone: every point of the grid meets the same draws, so that
    they are compared like with like (and share more stages), and more samples leave the first ones as they are."""
    grids = {key: draw.values for key, draw in section.parameters.items() if draw.kind == "grid"}
    found: dict[str, Point] = {}
    for sample in range(section.samples):
        drawn = {
            key: draw_value(draw, random.Random(f"{section.seed}/{sample}/{key}"))
            for key, draw in section.parameters.items()
            if draw.kind != "grid"
        }
        for combination in itertools.product(*grids.values()):
            chosen = {**dict(zip(grids, combination, strict=True)), **drawn}
            point = {key: chosen[key] for key in section.parameters}
            found.setdefault(json.dumps(point, sort_keys=True), point)
    return list(found.values())


def draw_value(draw: Draw, source: random.Random) -> Any:
    """One value; numbers to four digits, which is what a table shows and a person types again."""
    values = draw.values
    if draw.kind == "choice":
        return source.choice(values)
    if draw.kind == "randint":
        return source.randrange(*values)
    low, high = values
    value = source.uniform(low, high) if draw.kind == "uniform" else math.exp(source.uniform(*map(math.log, values)))
    return min(max(float(f"{value:.4g}"), low), high)


def short_keys(keys: list[str]) -> dict[str, str]:
    """Each dotted key by its last words, as many as tell it from the others."""
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
    """`base=1 head=0 lr=0.00031`."""
    short = short_keys(list(point))
    return between.join(f"{short[key]}={value_text(value)}" for key, value in point.items())


def value_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def folder_name(point: Mapping[str, Any]) -> str:
    """A folder that is the same whatever else the sweep tries: `base=1,head=0`."""
    text = point_text(point, ",")
    name = re.sub(r"[^A-Za-z0-9._=,-]+", "_", text)
    if name == text and len(name) <= _MOST_CHARACTERS:
        return name
    return f"{name[: _MOST_CHARACTERS - 9]}-{digest_json(dict(point))[:8]}"
